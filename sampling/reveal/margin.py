"""Show a fixed number a step, the clearest decision first: Dream's `topk_margin` (arXiv 2508.15487, 2502.06768)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal, checked_steps, margins


def margin(steps_per_block: int | None = None) -> Reveal:
    """As many a draft as `steps`, by how far the likeliest token is ahead of the second.

    Raises:
        ValueError: fewer than one step.
    """
    checked_steps(steps_per_block)

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        return canvas.show(canvas.rank(margins(logits)) < canvas.due())

    return reveal
