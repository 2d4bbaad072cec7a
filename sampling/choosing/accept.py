"""Accept rules: how many of a window's drafts a verification keeps, and the token that follows them.

The verifier's row i speaks of what follows window slot i; slot 0 is known, and a window of K slots has K-1 drafts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid.sampling.choosing.choice import sample


def verify_greedy(draft: Sequence[int], want: Sequence[int]) -> tuple[int, int]:
    """Keep drafts while they are what greedy decoding would have chosen (arXiv 1811.03115).

    Args:
        draft: K-1 tokens.
        want: the K that the verifier would choose.

    Returns:
        How many drafts are kept, and the token behind them.
    """
    n = next((i for i, token in enumerate(draft) if token != want[i]), len(draft))
    return n, want[n]


def verify_sampled(draft: Sequence[int], q: Tensor, p: Tensor, uniform: Sequence[float]) -> tuple[int, int]:
    """Rejection sampling: the output has exactly the left-to-right law (arXiv 2211.17192, algorithm 1).

    A draft x from q is kept with probability min(1, p(x) / q(x)); at the first one that is not, the next token
    comes from max(p - q, 0); after the last, from p.

    Args:
        draft: K-1 tokens.
        q: float64 `[K-1, V]`, the laws that they were drawn from.
        p: float64 `[K, V]`, the verifier's.
        uniform: K numbers in [0, 1).

    Returns:
        How many drafts are kept, and the token behind them.
    """
    index = torch.tensor(draft, dtype=torch.int64, device=p.device)[:, None]
    chances = torch.cat([p[:-1].gather(1, index), q.gather(1, index)], 1).tolist()
    good = [u * q_x < p_x for u, (p_x, q_x) in zip(uniform, chances, strict=False)]
    n = good.index(False) if False in good else len(good)
    rest = p[n] if n == len(good) else (p[n] - q[n]).clamp(min=0)  # nothing was drafted behind the last slot
    return n, int(sample(rest, torch.tensor(uniform[-1], dtype=torch.float64, device=p.device)))


def verify_fresh(draft: Sequence[int], p: Tensor, uniform: Sequence[float]) -> tuple[int, int]:
    """Keep drafts while they are what the verifier draws for itself: the output is its own sample, so its law is exact
    whatever the drafts are. Rejection sampling keeps more of them, but needs drafts that were all drawn at once: what
    a later draft draws depends on what an earlier one drew, and what is shown first on what was drawn for it.

    Args:
        draft: K-1 tokens.
        p: float64 `[K, V]`, the verifier's laws.
        uniform: K numbers in [0, 1).

    Returns:
        How many drafts are kept, and the token behind them.
    """
    return verify_greedy(draft, sample(p, torch.tensor(uniform, dtype=torch.float64, device=p.device)).tolist())
