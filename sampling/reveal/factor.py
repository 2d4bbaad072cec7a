"""Show more at once the surer the model is of all of it: Fast-dLLM's factor rule (arXiv 2505.22618, theorem 1)."""

import torch
from torch import Tensor

from hybrid.common.checks import is_number
from hybrid.sampling.reveal import Canvas, Reveal


def factor(confidence_factor: float = 1.0) -> Reveal:
    """The n most confident guesses while the n-th has a probability of at least 1 - f / (n + 1), and always the best.
    With f = 1 this is where greedy choices made together are those made one by one.

    Raises:
        ValueError: the factor is not a number above 0.
    """
    if not is_number(confidence_factor) or not confidence_factor > 0:
        raise ValueError(f"confidence_factor is {confidence_factor!r}; it must be a number above 0.")

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        rank = canvas.rank(canvas.certainty)
        good = canvas.certainty >= 1 - confidence_factor / (rank + 2)  # ranks count from 0
        first_bad = torch.where(canvas.hidden & ~good, rank, rank.shape[1]).amin(1, keepdim=True)
        return canvas.show(canvas.best(rank) | (rank < first_bad))

    reveal.can_wait = True  # type: ignore[attr-defined]
    return reveal
