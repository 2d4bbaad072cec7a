"""Show a fixed number a step, in random slots: LLaDA's random remasking (arXiv 2502.09992, section 2.4)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal, checked_steps


def random(steps_per_block: int | None = None) -> Reveal:
    """As many a draft as `steps`, wherever chance has it.

    Raises:
        ValueError: fewer than one step.
    """
    checked_steps(steps_per_block)

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        return canvas.show(canvas.rank(canvas.order) < canvas.due())

    reveal.in_order = True  # type: ignore[attr-defined]
    return reveal
