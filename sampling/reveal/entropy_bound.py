"""Show together what can hardly depend on one another: the EB-sampler (arXiv 2505.24857, section 4)."""

from torch import Tensor

from hybrid.common.checks import is_number
from hybrid.sampling.reveal import Canvas, Reveal, entropies


def entropy_bound(entropy_bound: float = 0.1) -> Reveal:
    """Slots by ascending entropy (nats), while the entropies before a slot sum to at most `entropy_bound`; always the
    first. The sum bounds what is lost by choosing them independently.

    Raises:
        ValueError: the bound is negative or no number.
    """
    if not is_number(entropy_bound) or not entropy_bound >= 0:
        raise ValueError(f"entropy_bound is {entropy_bound!r}; it must be a number, at least 0.")

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        entropy = entropies(logits)
        rank = canvas.rank(-entropy)
        ranked = entropy.gather(1, rank.argsort(1))
        before = (ranked.cumsum(1) - ranked).gather(1, rank)
        return canvas.show((rank == 0) | (before <= entropy_bound))

    return reveal
