"""Approximate caches for models whose clean text sees all of itself (Fast-dLLM, arXiv 2505.22618, section 3.2).

In such a model every key depends on the whole canvas, so no cache is exact. Keys change little from one draft to the
next, though, and these keep some of them while a block is drafted:

    prefix  what stands before the block; the block and all behind it are computed at each draft
    dual    what stands before and behind the block; only the block is computed

A block's first draft is a forward over the whole canvas, which everything kept comes from: that is the refresh. What is
kept is committed, what is drafted is provisional, as ever. For `dual` the block goes last in that forward, so that a
commit keeps the rest: labels say where a slot stands, its place in the cache does not matter.

Shapes: A active rows, N places of the canvas, T slots of a forward, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from hybrid import Layout
from hybrid.sampling.loop import Loop


class Approximate(Loop):
    """`cache="prefix"` or `"dual"`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cached = True
        self.fresh = torch.zeros_like(self.rows.length, dtype=torch.bool)  # rows whose block has just been opened
        self.arranged = self.place[:-1].expand(len(self.fresh), -1)  # [A, N] the order of places in the cache
        self.keep = torch.zeros_like(self.rows.length)  # [A] how many of them are kept while the block is drafted

    def _open(self, which: Tensor) -> None:
        super()._open(which)
        self.fresh = self.fresh | which
        rows, place = self.rows, self.place[:-1]
        # Where a slot is read off the row before it, that row is drafted too.
        first = rows.length - int(self.config.diffusion_prediction == "next")
        keep = first
        last = (place >= rows.limit[:, None]).long() * 2
        if self.plan.cache == "dual":
            keep = rows.limit - (rows.end - first)
            last += (place >= first[:, None]) & (place < rows.end[:, None])
        self.arranged = torch.where(which[:, None], last.argsort(dim=1, stable=True), self.arranged)
        self.keep = torch.where(which, keep, self.keep)

    def _retire(self, ends: list[int], lengths: list[int]) -> Tensor:
        stay = super()._retire(ends, lengths)
        self.fresh, self.arranged, self.keep = self.fresh[stay], self.arranged[stay], self.keep[stay]
        return stay

    def _step(self) -> None:
        """One draft for every active row: of its canvas where a block begins, of what is not kept elsewhere."""
        rows, hidden = self.rows, self._revealable(self.rows)
        everybody = torch.ones_like(self.fresh)
        layout = Layout.bidirectional(rows.start[:, None] + self.place[:-1])
        logits = self._partly(self._wanted(layout, hidden, everybody))
        self._count([True] * len(hidden))
        closed = self._draft(hidden, everybody, layout, logits)
        nothing = torch.zeros_like(closed)
        self._settle(closed, rows.end - rows.start, torch.zeros_like(rows.end), nothing, nothing)

    def _partly(self, wanted: Tensor) -> Tensor:
        """Logits `[A, N, V]` where `wanted`, from a forward over what is not kept; zero elsewhere."""
        cache, rows = self.cache, self.rows
        fresh = self.fresh.tolist()
        cache.rewind([0 if row < len(fresh) and fresh[row] else n for row, n in enumerate(cache.lengths)])
        kept = torch.tensor(cache.lengths[: len(fresh)], device=wanted.device)
        slot = kept[:, None] + torch.arange(int((rows.limit - kept).max()), device=wanted.device)
        real = slot < rows.limit[:, None]
        index = self.arranged.gather(1, slot.clamp(max=self.width - 1))
        layout = Layout.bidirectional(index)
        if not real.all():
            layout = layout.where(real)
        read = wanted.gather(1, index) & real
        pick = (~read).long().argsort(dim=1, stable=True)[:, : int(read.sum(1).max())]
        some = self._forward(rows.tokens.gather(1, index), layout, pick)
        cache.commit(torch.where(self.fresh, self.keep, 0).tolist())
        self.fresh = torch.zeros_like(self.fresh)
        # What a row has no use for goes behind its canvas.
        place = index.gather(1, pick).where(read.gather(1, pick), self.width)
        out = some.new_zeros(len(some), self.width + 1, some.shape[-1])
        return out.scatter_(1, place[..., None].expand_as(some), some)[:, :-1]
