"""Classifier-free guidance for models whose canvas is all there is, as LLaDA's published code has it: beside the canvas
stands another in which the prompt is hidden, and logits go on from what that one says, through what the canvas says,
`guidance` times as far."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybrid.sampling.engine import Read
from hybrid.sampling.row import Row
from hybrid.sampling.schemes import Outcome, Part, Windows, shapes


class Guided(Windows):
    """`guidance` other than 1."""

    def next(self, row: Row) -> Part:
        part = super().next(row)
        blind = [row.fill] * row.prompt + row.tokens[row.prompt :]
        return part._replace(tokens=[*part.tokens, *blind], layout=shapes.twice(self.law, len(row.tokens)))

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        guided = _Guided(read.engine, read.law, read.hidden, read.begin, rows)
        return super().take(rows, parts, guided)


@dataclass(frozen=True, eq=False)
class _Guided(Read):
    """Reads canvases with those behind them in which the prompt is hidden."""

    guides: Sequence[Row]

    def __call__(self, slots: Sequence[Sequence[int]]) -> Tensor:
        both = [[*own, *(len(row.tokens) + slot for slot in own)] for row, own in zip(self.guides, slots, strict=True)]
        found, logits = [], super().__call__(both)
        for row, part in zip(self.guides, logits.split([len(own) for own in both]), strict=True):
            seen, blind = part.chunk(2)
            scale = 1.0 if row.plan.guidance is None else row.plan.guidance
            found.append(blind + scale * (seen - blind))
        return self.law.without_mask(torch.cat(found))

    def of(self, rows: Sequence[int], behind: Sequence[int] | None = None) -> "_Guided":
        begin = super().of(rows, behind).begin
        return replace(self, begin=begin, guides=[self.guides[row] for row in rows])
