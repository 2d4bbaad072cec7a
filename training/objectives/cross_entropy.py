"""Cross-entropy that keeps no float32 copy of the logits.

A training step's largest tensors are its logits: n rows of V words. The usual way makes a float32 copy of them, a
second one with the log-probabilities, and two more for their gradients. Here a few rows at a time are widened, in
cache, and what stays for the backward pass is the logits as they came and one number a row, log Z:

    d nll_i / d logits_i = softmax(logits_i) - onehot(wanted_i),    d log Z_i / d logits_i = softmax(logits_i)

Shapes: n rows, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

# Logits that are widened at a time: what a CPU's cache holds, and enough to keep any other device busy.
AT_A_TIME = {"cpu": 2**19}
ELSEWHERE = 2**24


def cross_entropy(logits: Tensor, wanted: Tensor, never: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What each row of logits says of the token that is wanted there.

    Args:
        logits: `[n, V]`, of any floating type; what is computed from them is float32, or float64 if they are.
        wanted: int64 `[n]`.
        never: a token with probability 0 whatever its logit is, as the mask token.

    Returns:
        `[n]` each: -log p(wanted) in nats, the log of the softmax's denominator, both with gradients; and the most
        likely token, int64.
    """
    nll, log_z, best = _CrossEntropy.apply(logits, wanted, never)
    return nll, log_z, best


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, never: int | None) -> tuple[Tensor, Tensor, Tensor]:
        nll, log_z = (torch.empty(len(wanted), dtype=_wide(logits), device=logits.device) for _ in range(2))
        best = torch.empty_like(wanted)
        for rows in _slices(logits):
            x = _widened(logits[rows], never)
            said = x.gather(1, wanted[rows, None])[:, 0]
            largest, best[rows] = x.max(1)
            log_z[rows] = largest + x.sub_(largest[:, None]).exp_().sum(1).log()
            nll[rows] = log_z[rows] - said
        ctx.save_for_backward(logits, wanted, log_z)
        ctx.never = never
        ctx.mark_non_differentiable(best)
        return nll, log_z, best

    @staticmethod
    def backward(ctx: Any, of_nll: Tensor, of_log_z: Tensor, of_best: None) -> tuple[Tensor, None, None]:
        logits, wanted, log_z = ctx.saved_tensors
        grad, of_both = torch.empty_like(logits), of_nll + of_log_z
        for rows in _slices(logits):
            x = _widened(logits[rows], ctx.never).sub_(log_z[rows, None]).exp_()
            x.mul_(of_both[rows, None])
            grad[rows] = x.scatter_add_(1, wanted[rows, None], -of_nll[rows, None])
        return grad, None, None


def _slices(logits: Tensor) -> list[slice]:
    rows = max(1, AT_A_TIME.get(logits.device.type, ELSEWHERE) // logits.shape[1])
    return [slice(first, first + rows) for first in range(0, len(logits), rows)]


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _widened(logits: Tensor, never: int | None) -> Tensor:
    wide = logits.to(_wide(logits), copy=True)
    if never is not None:
        wide[:, never] = -torch.inf
    return wide
