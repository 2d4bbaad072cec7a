"""Show one slot at a time in random order: the first-hitting sampler (arXiv 2409.02908), as BD3-LM uses it."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal


def first_hitting() -> Reveal:
    """With sampling at temperature 1 an exact sample of the masked diffusion's law: ancestral sampling with infinitely
    many steps, in one forward a token.
    """

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        return canvas.show(canvas.rank(-canvas.order) == 0)

    reveal.in_order = True  # type: ignore[attr-defined]
    return reveal
