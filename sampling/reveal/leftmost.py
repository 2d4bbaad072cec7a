"""Show a fixed number a step, from left to right."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal, checked_steps


def leftmost(steps_per_block: int | None = None) -> Reveal:
    """As many a draft as `steps`, the first hidden ones.

    Raises:
        ValueError: fewer than one step.
    """
    checked_steps(steps_per_block)

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        return canvas.show(canvas.hidden & (canvas.hidden.cumsum(1) <= canvas.due()))

    return reveal
