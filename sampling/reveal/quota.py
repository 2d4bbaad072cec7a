"""Show a block's quota a draft, or all that is sure if that is more: SDAR's schedule (arXiv 2510.06303)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal, checked_steps, checked_threshold


def quota(steps_per_block: int | None = None, confidence_threshold: float | None = None) -> Reveal:
    """The most confident K // `steps_per_block` of a block of K slots a draft, and one more in each of the first K %
    `steps_per_block` (its `low_confidence_static`); with `confidence_threshold` all guesses with a probability above
    it, where these are more (`low_confidence_dynamic`). A block that begins with known text has the quota of a whole
    one, and so takes fewer drafts. Its `entropy_bounded` has no counterpart: as published, it cannot run.

    Raises:
        ValueError: an option out of range.
    """
    checked_steps(steps_per_block)
    if confidence_threshold is not None:
        checked_threshold(confidence_threshold)

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        count = canvas.width // canvas.steps + (canvas.step < canvas.width % canvas.steps)
        shown = canvas.rank(canvas.certainty) < count[:, None]
        return canvas.show(shown if confidence_threshold is None else shown | (canvas.certainty > confidence_threshold))

    return reveal
