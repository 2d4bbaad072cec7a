"""What a product by a weight costs on this machine, by each kernel: measured once, and kept in the user's cache.

`plain` is torch's product. `turned` is the same from the other side, w x^T, which some machines are far better at for a
few rows. `packed` wants a copy of the weight (`packs.py`).
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.common.files import CACHE_VARIABLES, cache_folder, write_whole
from hybrid.fast.packs import pack, product

# What decides how fast a product is, beside the vector width.
PRODUCTS = ("avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "bf16", "i8mm", "sve")
VERSION = 1
ROWS = (1, 2, 4, 8, 16, 32, 64)
SAMPLE = 2 << 20  # bytes of a weight: soon multiplied
COLD = 32 << 20  # bytes of all that are measured
TURNS = 4
ALIKE = 2.0  # times: repeats of a product on a quiet machine differ by less
PATIENCE = 0.3  # seconds for one weight; quiet machines need a third of it
AGAIN = 60.0  # seconds until a machine that was busy is asked again


@dataclass(frozen=True, eq=False)
class Costs:
    """Seconds for a whole weight.

    Attributes:
        product: by kernel, at each number of `ROWS`; what this machine does not have is left out.
        pack: of copying.
    """

    product: dict[str, list[float]]
    pack: float

    def times(self, factor: float) -> "Costs":
        product = {kernel: [s * factor for s in per_rows] for kernel, per_rows in self.product.items()}
        return Costs(product, self.pack * factor)


_KNOWN: dict[tuple[object, ...], Costs] = {}
_LOCK = threading.Lock()
_asked = -AGAIN


def costs(out: int, size: int, dtype: torch.dtype) -> Costs | None:
    """Of a weight `[out, size]`, taken from a part of it where it is large. None while the machine is too busy to say:
    torch's product serves as well then, and what others' work decides would be kept for good."""
    global _asked
    place = _place(torch.get_num_threads(), *map(os.environ.get, CACHE_VARIABLES))
    key = (place, out, size, dtype)
    if key in _KNOWN:
        return _KNOWN[key]
    rows = min(out, max(1, SAMPLE // (size * dtype.itemsize)))
    name = f"{rows}x{size} {dtype}"
    with _LOCK:
        found = _KNOWN.get((place, name)) or _read(place).get(name)
        if found is None and time.monotonic() - _asked >= AGAIN:
            if (found := _measure(rows, size, dtype)) is None:
                _asked = time.monotonic()
            else:
                _write(place, {**_read(place), name: found})
        if found is None:
            return None
        _KNOWN[place, name], _KNOWN[key] = found, found.times(out / rows)
    return _KNOWN[key]


def turned(x: Tensor, weight: Tensor) -> Tensor:
    """`[N, in]` by `[out, in]` to `[N, out]`."""
    if len(x) == 1:  # two, since torch has another kernel for one, which uses one core
        return torch.mm(weight, torch.cat([x, x]).t()).t()[:1].contiguous()
    return torch.mm(weight, x.t()).t().contiguous()


@torch.inference_mode()
def _measure(rows: int, size: int, dtype: torch.dtype) -> Costs | None:
    """Of weights `[rows, size]` that come from memory, as those of a model do: there are too many to stay near. Turns
    are taken until the best two of each product agree; None where that takes too long."""
    until = time.perf_counter() + PATIENCE
    count = max(1, COLD // (rows * size * dtype.itemsize))
    weights = [torch.full((rows, size), 0.5, dtype=dtype, device="cpu") for _ in range(count)]
    kernels: dict[str, Callable[[int, Tensor], Tensor]] = {
        "plain": lambda i, x: torch.mm(x, weights[i].t()),
        "turned": lambda i, x: turned(x, weights[i]),
    }
    packed: list[Tensor] = []
    copying = []
    with contextlib.suppress(RuntimeError):  # not in this number format, or not on this processor
        for weight in weights:
            if not packed or time.perf_counter() < until - PATIENCE / 2:
                copying.append(_seconds(lambda: packed.append(pack(weight))))  # noqa: B023 (it is called at once)
        product(weights[0][:1], packed[0], None)
        kernels["packed"] = lambda i, x: product(x, packed[i % len(packed)], None)
    taken: dict[str, list[list[float]]] = {kernel: [[] for _ in ROWS] for kernel in kernels}
    turn, quiet = itertools.cycle(range(count)), False
    while not quiet:
        for i, many in enumerate(ROWS):
            x = torch.full((many, size), 0.5, dtype=dtype, device="cpu")
            for kernel, run in kernels.items():
                taken[kernel][i].append(_seconds(functools.partial(run, next(turn), x)))
                if time.perf_counter() > until:
                    return None
        each = [sorted(seconds) for per_rows in taken.values() for seconds in per_rows]
        quiet = all(len(seconds) >= TURNS and seconds[1] < ALIKE * seconds[0] for seconds in each)
    best = {kernel: [min(seconds) for seconds in per_rows] for kernel, per_rows in taken.items()}
    return Costs(best, min(copying, default=math.inf))


def _seconds(run: Callable[[], object]) -> float:
    # Where there is one thread its own time is taken, which is the same on a busy machine.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    run()
    return clock() - began


@functools.lru_cache(maxsize=8)  # asked for every weight of every call
def _place(threads: int, *_variables: str | None) -> Path | None:
    """The file for this machine, as it is set up now; None where there is no home."""
    about = (VERSION, platform.machine(), cpu_name(), instruction_sets(), os.cpu_count(), threads, torch.__version__)
    try:
        return cache_folder() / "kernels" / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.json"
    except RuntimeError:
        return None


def _read(place: Path | None) -> dict[str, Costs]:
    """Nothing where the file is not there, or not whole: it is measured anew then."""
    try:
        found = {} if place is None else json.loads(place.read_text())
        return {name: _checked(entry) for name, entry in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _checked(entry: Any) -> Costs:
    read = Costs({str(kernel): [float(s) for s in many] for kernel, many in entry["product"].items()}, entry["pack"])
    if any(len(many) != len(ROWS) for many in read.product.values()) or not {"plain", "turned"} <= set(read.product):
        raise ValueError
    if not all(s > 0 for many in (*read.product.values(), [read.pack]) for s in many):
        raise ValueError
    return read


def _write(place: Path | None, known: dict[str, Costs]) -> None:
    if place is None:
        return
    with contextlib.suppress(OSError):  # it is measured again by the next process
        entries = {name: vars(entry) for name, entry in known.items()}
        write_whole(place, json.dumps(entries, indent=1).encode(), alone=False)


@functools.cache
def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The vector width that torch uses, and what the processor has for products."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return (torch.backends.cpu.get_cpu_capability(), *(name for name in PRODUCTS if name in flags))


def _cpuinfo(field: str) -> str:
    """Of the first core; empty where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field)
    except (OSError, StopIteration):
        return ""
