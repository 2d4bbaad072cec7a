"""Products by weights, each by the kernel that is fastest here for its shape, its number format and its rows.

Shapes: N rows.
"""

import functools
import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hybrid.fast.costs import ROWS, Costs, costs, turned
from hybrid.fast.packs import available, kept, product

MEASURED = (torch.float32, torch.bfloat16)
LARGE = 8 << 20  # bytes of a model's weights: fewer stay near the core, where all kernels are alike
WORTH = 1 << 16  # weights: calling is what a product by fewer costs
CLEARLY = 0.9  # of the time: what saves less may be noise
CALL = 5e-6  # seconds: what each further call costs where several maps are one
DUE = 0.25  # of what a copy costs, lost for want of it: it is made then, and serves later calls too


class Choice(NamedTuple):
    """For one number of rows: from which side to multiply without a copy, and the seconds that a copy saves."""

    turned: bool
    saving: float


class Map:
    """Linear maps that meet the same input, as one, with their weights as they are when this is made: `[N, in]` to
    `[N, sum of out]`."""

    def __init__(self, maps: Sequence[nn.Linear], *, copied: bool = False, measured: bool = True) -> None:
        """`copied`: put the weights of several maps side by side, which saves calls. `measured`: choose the kernel."""
        self.maps, self.weights = maps, [m.weight.detach() for m in maps]
        self.bias = None if maps[0].bias is None else torch.cat([m.bias.detach() for m in maps])
        self.whole = None
        if len(maps) == 1 or copied:
            self.whole = (self.weights[0] if len(maps) == 1 else torch.cat(self.weights)).t()
        self.choices: tuple[Choice, ...] | None = None
        self.costs: Costs | None = None
        self.packed: Tensor | None = None
        self.lost = self.due = 0.0
        weight, out = self.weights[0], sum(map(len, self.weights))
        large = out * weight.shape[1] >= WORTH and all(weight.is_contiguous() for weight in self.weights)
        if measured and large and (found := costs(out, weight.shape[1], weight.dtype)) is not None:
            self.costs, self.choices = found, _choices(found, 1 if self.whole is not None else len(maps))
            self.due = DUE * found.pack

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """The product, added to `onto`."""
        other_side, rank = False, (len(x) - 1).bit_length()
        if self.choices is not None and rank < len(ROWS):  # torch is good at many rows
            other_side, saving = self.choices[rank]
            if saving > 0 and (packed := self._packed(saving)) is not None:
                out = product(x, packed, self.bias)
                return out if onto is None else out.add_(onto)
        if self.whole is None or other_side:
            parts = [turned(x, weight) if other_side else torch.mm(x, weight.t()) for weight in self.weights]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        elif onto is not None and self.bias is None:
            return torch.addmm(onto, x, self.whole)
        else:
            out = torch.mm(x, self.whole)
        if self.bias is not None:
            out += self.bias
        return out if onto is None else out.add_(onto)

    def seconds(self, rows: int) -> float:
        """What the product of so many rows takes, by the kernel that is chosen; 0 where nothing was measured."""
        if self.costs is None:
            return 0.0
        best = [min(each) for each in zip(*self.costs.product.values(), strict=True)]
        if rows >= ROWS[-1]:
            return best[-1] * rows / ROWS[-1]
        # Three rows are multiplied as four are, with the kernel that is chosen for four, and take as long.
        rows = 4 if rows == 3 else rows
        rank = bisect_right(ROWS, rows) - 1
        share = (rows - ROWS[rank]) / (ROWS[rank + 1] - ROWS[rank])
        return best[rank] + share * (best[rank + 1] - best[rank])

    def _packed(self, saving: float) -> Tensor | None:
        """The copy, once enough has been lost for want of it. When that is does not depend on whether there is one
        already: the same call gives the same numbers, first or last."""
        if self.packed is None:
            self.lost += saving
            if self.lost >= self.due:
                self.packed = kept(self.maps[0], self.weights)
                self.due = float("inf")
        return self.packed


def measurable(weight: Tensor, size: int) -> bool:
    """Whether there is a choice of kernels for weights like this one, of `size` bytes together, and the user wants it
    made. HYBRID_KERNELS=plain says no: torch's products, no copies, and nothing measured."""
    said = os.environ.get("HYBRID_KERNELS", "measured")
    if said not in ("measured", "plain"):
        raise ValueError(f"HYBRID_KERNELS is {said!r}; use 'measured' or 'plain'.")
    fits = size >= LARGE and weight.device.type == "cpu" and weight.dtype in MEASURED
    return said == "measured" and fits and available()


@functools.cache
def _choices(found: Costs, calls: int) -> tuple[Choice, ...]:
    """At each number of `ROWS`; without a copy there are so many calls."""
    chosen = []
    for index, plain in enumerate(found.product["plain"]):
        other_side = found.product["turned"][index] < CLEARLY * plain
        without = CALL * (calls - 1) + (found.product["turned"][index] if other_side else plain)
        saving = without - found.product["packed"][index] if "packed" in found.product else 0.0
        chosen.append(Choice(other_side, saving if saving > (1 - CLEARLY) * without else 0.0))
    return tuple(chosen)
