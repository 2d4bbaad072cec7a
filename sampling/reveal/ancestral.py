"""Show each slot at a random one of many steps: ancestral sampling of the masked diffusion (MDLM, arXiv 2406.07524)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal, checked_steps


def ancestral(steps_per_block: int | None = None) -> Reveal:
    """With `steps_per_block` steps and a linear schedule every slot's step is uniform and independent. Steps that show
    nothing cost no forward, so many steps cost little more than the slots there are.

    With sampling at temperature 1 and ever more steps the law is the model's own.

    Raises:
        ValueError: fewer than one step.
    """
    checked_steps(steps_per_block)

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        due = (canvas.order * canvas.steps).floor().masked_fill(~canvas.hidden, canvas.steps)
        return canvas.show(due == due.amin(1, keepdim=True))

    reveal.in_order = True  # type: ignore[attr-defined]
    return reveal
