"""Show a fixed number a step, the most confident first: LLaDA's low-confidence remasking (arXiv 2502.09992)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal


def steps(steps_per_block: int | None = None) -> Reveal:
    """What is hidden is spread evenly over `steps_per_block` drafts of a window, the remainder first; by
    default one slot a draft.

    Raises:
        ValueError: fewer than one step.
    """
    if steps_per_block is not None and (not isinstance(steps_per_block, int) or steps_per_block < 1):
        raise ValueError(f"steps_per_block is {steps_per_block!r}; it must be a whole number, at least 1.")

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        left = (canvas.steps - canvas.step).clamp(min=1)[:, None]
        count = (canvas.hidden.sum(1, keepdim=True) + left - 1) // left
        return canvas.show(canvas.rank(canvas.certainty) < count)

    return reveal
