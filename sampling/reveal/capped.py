"""Show what the model is sure of, but no faster than planned: Fast-dLLM's threshold for Dream (arXiv 2505.22618)."""

from torch import Tensor

from hybrid.sampling.reveal import Canvas, Reveal, checked_steps, checked_threshold


def capped(confidence_threshold: float = 0.9, steps_per_block: int | None = None) -> Reveal:
    """Every guess with a probability of at least `confidence_threshold`, the best ones first, while after d of
    `steps_per_block` drafts at most d / `steps_per_block` of the window is shown; and always the best one. What a draft
    leaves of its share is there for later ones.

    Raises:
        ValueError: an option out of range.
    """
    checked_steps(steps_per_block)
    checked_threshold(confidence_threshold)

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        hidden, rank = canvas.hidden.sum(1), canvas.rank(canvas.certainty)
        every = hidden + canvas.drafted.sum(1)
        most = -(-every * (canvas.step + 1) // canvas.steps) - (every - hidden)
        sure = (rank < most[:, None]) & (canvas.certainty >= confidence_threshold)
        return canvas.show((rank == 0) | sure)

    return reveal
