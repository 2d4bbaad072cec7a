"""Which range of times makes the loss vary least: BD3-LM's search for its clipped schedule (arXiv 2503.09573).

Times near 0 mask next to nothing, at a large weight, and times near 1 all but everything; where the loss of a block
varies least in between depends on the block size and on the model, so it is measured, on held-out text.

Shapes: B rows, T tokens, n blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.common.checks import require
from hybrid.noise import Noise, corrupt, seed_clean
from hybrid.training.batch import Batch
from hybrid.training.objective import Objective, losses

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """What one range of times gives.

    Attributes:
        t_range: the range.
        mean: of the blocks' losses, nats a token; of ranges other than 0 to 1 it is no bound.
        variance: of the same, nats squared.
        standard_error: of `variance`.
    """

    t_range: Range
    mean: float
    variance: float
    standard_error: float


def candidates(widths: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9), stride: float = 0.05) -> list[Range]:
    """Every range of these widths that begins at a multiple of `stride`, as BD3-LM has them, and the whole.

    Raises:
        ValueError: a width or the stride is not between 0 and 1.
    """
    if not all(0 < x <= 1 for x in (*widths, stride)):
        raise ValueError(f"widths are {tuple(widths)} and stride is {stride}; all must lie between 0 and 1.")
    found = []
    for width in widths:
        count = int((1 - width) / stride + 1e-9) + 1
        found += [(round(k * stride, 6), round(k * stride + width, 6)) for k in range(count)]
    return list(dict.fromkeys([*found, (0.0, 1.0)]))


@torch.no_grad()
def block_losses(model: HybridForCausalLM, batch: Batch, noise: Noise, seed: int) -> Tensor:
    """float64 `[n]`: the weighted cross-entropy of each block that has anything to learn, in nats a token of it."""
    config, target = model.config, batch["target"]
    noised = corrupt(batch["input_ids"], target, batch["doc"], batch["index"], noise, config, seed)
    place, block = noised.layout.position, noised.layout.block
    learned = target.gather(1, place) & (noised.layout.doc >= 0)
    if seed_clean(noise, config):
        learned &= place != block
    found = losses(model, batch, Objective(ar_weight=0.0, diffusion_weight=1.0, noise=noise), seed)
    assert found.masked_nll is not None
    nll = torch.zeros_like(noised.weight, dtype=torch.float64)
    nll[noised.masked] = found.masked_nll.double()
    zero = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
    total = zero.scatter_add(1, block, nll * noised.weight)
    size = zero.scatter_add(1, block, learned.double())
    return total[size > 0] / size[size > 0]


def search(
    model: HybridForCausalLM, batches: Sequence[Batch], noise: Noise, ranges: Sequence[Range], *,
    draws: int = 1, seed: int = 0,
) -> list[Clipped]:  # fmt: skip
    """Each range and the variance of the blocks' losses, the least first.

    All ranges see the same text and the same random numbers, so that less of their differences is chance. First drafts
    and canvases, of which there is nothing to clip, are left out, and so are complementary masks, whose weights are 1.

    Args:
        draws: how often each batch is corrupted anew.

    Raises:
        ValueError: no batches, no draws, or settings that do not go with the model.
    """
    require(min(len(batches), draws) >= 1, f"batches: {len(batches)}, draws: {draws}; both must be at least 1.")
    noise = replace(noise, draft_prob=0.0, canvas_prob=0.0, complementary=False)
    noise.check(model.config, batches[0]["input_ids"].shape[1])
    found = []
    for t_range in ranges:
        clipped = replace(noise, t_range=t_range)
        clipped.check(model.config, batches[0]["input_ids"].shape[1])
        parts = [block_losses(model, b, clipped, seed + draw) for draw in range(draws) for b in batches]
        values = torch.cat(parts)
        count, mean = len(values), values.mean()
        require(count >= 2, "batches: there are fewer than two blocks to learn; give more rows.")
        square = (values - mean) ** 2
        variance = float(square.sum() / (count - 1))
        error = math.sqrt(max(0.0, float((square**2).mean()) - variance**2) / count)
        found.append(Clipped(t_range=t_range, mean=float(mean), variance=variance, standard_error=error))
    return sorted(found, key=lambda c: c.variance)
