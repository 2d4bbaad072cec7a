"""Show a fixed number a step, the most confident first: LLaDA's low-confidence remasking (arXiv 2502.09992)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal, checked_steps


def steps(steps_per_block: int | None = None) -> Reveal:
    """What is hidden is spread evenly over `steps_per_block` drafts of a window, the remainder first; by
    default one slot a draft.

    Raises:
        ValueError: fewer than one step.
    """
    checked_steps(steps_per_block)

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        return canvas.show(canvas.rank(canvas.certainty) < canvas.due())

    return reveal
