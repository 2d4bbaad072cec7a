"""Show what the model is sure of: Fast-dLLM's confidence threshold (arXiv 2505.22618, section 3.3)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal, checked_threshold


def threshold(confidence_threshold: float = 0.9) -> Reveal:
    """Every guess with a probability of at least `confidence_threshold`, and always the best one of a row.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """
    checked_threshold(confidence_threshold)

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        sure = canvas.certainty >= confidence_threshold
        return canvas.show(canvas.best(canvas.rank(canvas.certainty)) | sure)

    reveal.can_wait = True  # type: ignore[attr-defined]
    return reveal
