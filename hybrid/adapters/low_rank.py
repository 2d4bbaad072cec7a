"""A low-rank delta beside a linear map that only noisy tokens feel: what a draft adapter puts into a forward."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.layout import PROBE, Layout


class Delta(NamedTuple):
    """`scale * up down x`, with `down` `[rank, in]` and `up` `[out, rank]`."""

    down: Tensor
    up: Tensor
    scale: float


def noisy_slots(layout: Layout) -> Tensor | bool:
    """Which tokens of a forward are noisy: all (True), none (False), or bool `[B or 1, T, 1]`. Probes are not: what
    they say is exact."""
    marked = (layout.stream > 0) & (layout.stream != PROBE)
    if marked.all():
        return True
    return marked[..., None] if marked.any() else False


class Deltas(NamedTuple):
    """Those of one layer, by the names of its maps, and which tokens feel them."""

    of: dict[str, Delta]
    noisy: Tensor | bool


def mapped(module: nn.Module, name: str, x: Tensor, deltas: Deltas | None) -> Tensor:
    """The map of that name of a module, with its delta where one is active."""
    out: Tensor = getattr(module, name)(x)
    delta = None if deltas is None else deltas.of.get(name)
    if deltas is None or delta is None or deltas.noisy is False:
        return out
    low = F.linear(x, delta.down.to(x.dtype))
    moved = out + (F.linear(low, delta.up.to(x.dtype)) * delta.scale).to(out.dtype)
    return moved if deltas.noisy is True else torch.where(deltas.noisy, moved, out)
