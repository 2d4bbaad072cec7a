"""Approximate caches for models whose clean text sees all of itself (Fast-dLLM, arXiv 2505.22618, section 3.2).

In such a model every key depends on the whole canvas, so no cache is exact. Keys change little from one draft to the
next, though, and these keep some of them while a block is drafted:

    prefix  what stands before the block; the block and all behind it are computed at each draft
    dual    what stands before and behind the block; only the block is computed

A block's first draft is a forward over the whole canvas, which everything kept comes from: that is the refresh. What is
kept is committed, what is drafted is provisional, as ever. For `dual` the block goes last in that forward, so that a
commit keeps the rest: labels say where a slot stands, its place in the cache does not matter.

Where a slot is read off the row before it (Dream), the block's first slot is read off what is kept. So the first draft
shows that slot, whatever the rule says, and no other, as theirs does. A rule that may hide it again has the row before
the block computed with the block instead.
"""

import torch

from hybrid import Layout
from hybrid.sampling.row import Row
from hybrid.sampling.schemes import Part, Windows


class Approximate(Windows):
    """`cache="prefix"` or `"dual"`."""

    def next(self, row: Row) -> Part:
        index, keep = self.arranged(row)
        fresh = row.step == 0
        index = index if fresh else index[keep:]
        layout = Layout.bidirectional(torch.tensor([index]))
        return Part([row.tokens[i] for i in index], layout, "draft", keep=keep if fresh else 0, rewind=fresh)

    def arranged(self, row: Row) -> tuple[list[int], int]:
        """The positions of the canvas in the order of the cache, and how many of them are kept."""
        first = row.length - (self.law.follows and row.plan.remasks)
        if row.plan.cache == "prefix":
            return list(range(row.limit)), first
        block = range(first, row.end)
        rest = [i for i in range(row.limit) if i not in block]
        return [*rest, *block], len(rest)

    def slots(self, row: Row, part: Part) -> list[int]:
        hidden = super().slots(row, part)
        return hidden[:1] if row.step == 0 and self.law.follows and not row.plan.remasks else hidden

    def wanted(self, row: Row, part: Part) -> list[int]:
        where = {position: i for i, position in enumerate(part.layout.position[0].tolist())}
        return [where[position] for position in super().wanted(row, part)]
