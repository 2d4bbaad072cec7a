"""Weights in the order that oneDNN multiplies by fastest: copies, made once and kept as long as their module.

Nothing says cheaply whether a weight has changed since: version counters do not see what is written through `.data`, by
NumPy or by another process, and addresses see replacement only. So whoever wants to use a copy has the weight read
again, every bit of it, and compared by checksum. Reading goes at the speed of memory, and takes about as long as a
forward of one token: it is done once a call, and counters serve in between (`Flat.outdated`).
"""

import functools
import mmap
import threading
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

SPARE = 0.25  # of the machine's memory stays free
WIDTH = 512  # words: sums of that many are kept near the core


class Pack(NamedTuple):
    """A copy, and what it is a copy of."""

    checksum: tuple[object, ...]
    weight: Tensor


_KEPT: WeakKeyDictionary[nn.Module, Pack] = WeakKeyDictionary()
_LOCK = threading.Lock()


def available() -> bool:
    """Whether this machine's torch multiplies by packed weights."""
    ops = ("_reorder_linear_weight", "_linear_pointwise")
    there = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return there and all(hasattr(torch.ops.mkldnn, op) for op in ops)


def pack(weight: Tensor) -> Tensor:
    """`[out, in]`, for `product`."""
    with torch.inference_mode(False), torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`[N, in]` to `[N, out]`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def kept(owner: nn.Module, weights: list[Tensor]) -> Tensor | None:
    """`weights`, one below the other, packed as they are now; None where memory is short. What is kept for `owner` is
    compared first, and made anew where they have changed. Threads may ask at once."""
    with _LOCK:
        now = tuple(checksum(weight) for weight in weights)
        old = _KEPT.pop(owner, None)
        if old is not None and old.checksum != now:
            old = None  # and with it its memory, before the next is made
        if old is None and _room(sum(weight.nbytes for weight in weights)):
            old = Pack(now, pack(weights[0] if len(weights) == 1 else _joined(weights)))
        if old is None:
            return None
        _KEPT[owner] = old
        return old.weight


def _joined(weights: list[Tensor]) -> Tensor:
    """In pages of their own, which go back to the system: the heap would keep a hole beside each copy, half a model in
    all."""
    pages = mmap.mmap(-1, sum(weight.nbytes for weight in weights))
    joined = torch.frombuffer(pages, dtype=weights[0].dtype).view(-1, weights[0].shape[1])
    return torch.cat(weights, out=joined)


def checksum(weight: Tensor) -> tuple[object, ...]:
    """Of every bit, and of where it stands: two different weights of a shape have the same one by a chance of 1 in 2^32
    or less. For 12 bytes or more.

    Words are multiplied by odd random numbers and added up, modulo 2^64. A word's upper bits reach no lower ones, so
    the signs of every second float32 would hardly count: two that change cancel out. They are in the middle of those
    words that begin four bytes later, so a second sum is taken of these.
    """
    raw = weight.view(-1).view(torch.uint8).numpy()
    found: list[object] = [weight.dtype, weight.shape, raw[len(raw) // 8 * 8 :].tobytes()]
    for begin in (0, 4):
        words = torch.frombuffer(raw, dtype=torch.int64, offset=begin, count=(len(raw) - begin) // 8)
        whole = words[: len(words) // WIDTH * WIDTH].view(-1, WIDTH)
        rest = words[whole.numel() :]
        factors = _factors(len(whole) + 2 * WIDTH)
        across, after, down = factors.split([WIDTH, WIDTH, len(whole)])
        found.append(int(whole.t().mv(down).dot(across) + rest.dot(after[: len(rest)])))
    return tuple(found)


@functools.lru_cache(maxsize=8)
def _factors(count: int) -> Tensor:
    with torch.inference_mode(False):
        source = torch.Generator("cpu").manual_seed(0)
        return torch.randint(-(2**63), 2**63 - 1, (count,), generator=source, device="cpu") | 1


def _room(size: int) -> bool:
    """Whether the machine can spare so many bytes."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        found = {words[0]: 1024 * int(words[1]) for words in lines}
        return found["MemAvailable:"] - size > SPARE * found["MemTotal:"]
    except (OSError, KeyError, IndexError, ValueError):
        return True  # the system does not say
