"""Show what the model is sure of: Fast-dLLM's confidence threshold (arXiv 2505.22618, section 3.3)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal


def threshold(confidence_threshold: float = 0.9) -> Reveal:
    """Every guess with a probability of at least `confidence_threshold`, and always the best one of a row.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """
    if not isinstance(confidence_threshold, int | float) or not 0 < confidence_threshold <= 1:
        raise ValueError(f"confidence_threshold is {confidence_threshold!r}; it must be a number in (0, 1].")

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        return canvas.show((canvas.rank(canvas.certainty) == 0) | (canvas.certainty >= confidence_threshold))

    return reveal
