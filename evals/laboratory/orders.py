"""A tighter bound: the mean over several orders of reveal, before the logarithm and not after it.

A window that is decoded one slot at a time in a uniformly random order has the law p(x) = E over orders of
p(x | order). The masked bound is E[-log p(x | order)]; with K orders, E[-log (1/K) sum of p(x | order_k)] lies between
that (K = 1) and -log p(x), and never rises with K (Jensen; arXiv 1509.00519, theorem 1, with the order as the latent
variable and its own law as the proposal). Windows are conditionally independent given the text before them, so each
has a mean of its own, which is tighter than one over whole texts.

Shapes: B rows, T tokens, K orders, S samples.
"""

import math

import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.common.renamed import renamed_argument
from hybrid.evals.windows import Windows, by_rows, check_law
from hybrid.noise import uniform


@renamed_argument("seeds", "seed_tokens")
@torch.no_grad()
def order_bound(
    model: HybridForCausalLM, ids: Tensor, target: Tensor, *, block_size: int | None, seed_tokens: bool, orders: int,
    samples: int = 2, seed: int = 0, batch_size: int = 32,
) -> Tensor:  # fmt: skip
    """float64 `[S, B]`: independent unbiased estimates of the K-order bound of each row's -log p, in nats.

    A sample costs K n forwards of a row, n being the open slots of its largest window, where a sample of `bound` costs
    one: at K = 1 the mean is the same, and the spread smaller.

    Args:
        ids: int64 `[B, T]`.
        target: bool `[B, T]`, the tokens that are scored: one unbroken stretch a row.
        block_size, seed_tokens: the law, as in `hybrid.evals.likelihood.bound`.
        orders: K.
        seed: of the orders; a row's depend on it and on the row's number, not on `batch_size`.
        batch_size: rows at once, those of different orders counted apart.

    Raises:
        ValueError: fewer than one order, or as `bound`.
    """
    if orders < 1:
        raise ValueError(f"orders is {orders}; average over at least one.")
    check_law(model, ids, target, block_size, seed_tokens)

    def estimate(rows: Tensor, goal: Tensor, index: Tensor) -> Tensor:
        rows, goal = rows.repeat_interleave(orders, 0), goal.repeat_interleave(orders, 0)
        view = Windows.of(model, rows, goal, block_size, seed_tokens)
        draws = uniform(seed, index, orders * view.length).view(-1, view.length).to(model.device)
        rank = view.ranks(draws)
        total = torch.zeros(rank.shape, dtype=torch.float64, device=rank.device)
        for turn in range(max(1, int(view.n.max()))):
            nll, seed_nll = view.nll(model, view.open & (rank >= turn), view.open & (rank == turn))
            total += nll
        # Each window's sum stands at its first slot; everywhere else the mean of K zeros is zero.
        windows = torch.zeros_like(total).scatter_add(1, view.starts, total).view(-1, orders, view.length)
        mean = math.log(orders) - (-windows).logsumexp(1)
        return mean.sum(1) + seed_nll[::orders].sum(1)

    return by_rows(estimate, ids, target, samples, max(1, batch_size // orders))
