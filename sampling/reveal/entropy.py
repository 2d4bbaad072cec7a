"""Show a fixed number a step, the least uncertain first: Dream's `entropy` (arXiv 2508.15487)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal, checked_steps, entropies


def entropy(steps_per_block: int | None = None) -> Reveal:
    """As many a draft as `steps`, by the entropy of each slot's distribution.

    Raises:
        ValueError: fewer than one step.
    """
    checked_steps(steps_per_block)

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        return canvas.show(canvas.rank(-entropies(logits)) < canvas.due())

    return reveal
