"""Choosing tokens from logits: warped as transformers warps, drawn with the caller's generators.

Shapes: B rows, K slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList

Warp = Callable[[Tensor], Tensor]  # logits [..., V] -> logits [..., V]


@dataclass(frozen=True)
class Draws:
    """One generator per row; a single one may stand for several rows. Global random state is not touched."""

    generators: Sequence[torch.Generator]

    def uniform(self, wanted: Tensor) -> Tensor:
        """float64 `[B, K]` in [0, 1): fresh where bool `[B, K]` says so, 0 elsewhere.

        A row draws as many numbers as it wants, so what it gets does not depend on its neighbours, not even on how
        wide they make the window.
        """
        out = torch.zeros(wanted.shape, dtype=torch.float64, device=wanted.device)
        for row, count in enumerate(wanted.sum(1).tolist()):
            if count:
                source = self.generators[row]
                drawn = torch.rand(count, dtype=torch.float64, device=source.device, generator=source)
                out[row, wanted[row]] = drawn.to(out.device)
        return out

    def select(self, rows: Sequence[int]) -> "Draws":
        return Draws([self.generators[i] for i in rows])


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token at quantile `uniform` `[...]` of `probs` `[..., V]`: float64, so that no tail is cut off.

    Tokens of probability zero are never returned. `probs` need not be normalised.
    """
    total = probs.double().cumsum(-1)
    # Strictly below the end: rounding up to it would pick the last token even if it has no probability.
    end = torch.nextafter(total[..., -1:], torch.zeros_like(total[..., -1:]))
    point = torch.minimum(uniform[..., None] * total[..., -1:], end)
    return torch.searchsorted(total, point, right=True).squeeze(-1)


@dataclass(frozen=True)
class Chooser:
    """Turns logits into tokens: greedily when `warp` is None, else by sampling the warped distribution.

    `processors`, one list a row or none at all, look at the text before a token is chosen.
    """

    draws: Draws
    warp: Warp | None
    processors: Sequence[LogitsProcessorList] = ()

    def process(self, logits: Tensor, text: Tensor, ends: Tensor, rows: Tensor) -> Tensor:
        """Logits `[B, S, V]` as the processors of the marked `rows` (bool `[B]`) want them; slot s of a row follows
        `text[:ends[s]]` (int64 `[B, N]` and `[B, S]`)."""
        out = logits.clone()
        for row in rows.nonzero().flatten().tolist():
            slots = ends[row].tolist()
            for end in set(slots):
                same = [i for i, e in enumerate(slots) if e == end]
                history = text[row : row + 1, :end].expand(len(same), -1)
                out[row, same] = self.processors[row](history, logits[row, same]).to(out.dtype)
        return out

    def probs(self, logits: Tensor) -> Tensor:
        """The law that tokens are drawn from, `[..., V]`: warped, in float64."""
        assert self.warp is not None, "a greedy choice has no law"
        return self.warp(logits).double().softmax(-1)

    def choose(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Tokens `[B, K]` for logits `[B, K, V]`; when sampling, only those marked in bool `[B, K]` are drawn."""
        if self.warp is None:
            return logits.argmax(-1)
        return sample(self.probs(logits), self.draws.uniform(wanted))

    def select(self, rows: Sequence[int]) -> "Chooser":
        return Chooser(self.draws.select(rows), self.warp, [self.processors[i] for i in rows if self.processors])


def confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """The model's own probability of `tokens` `[B, K]` under `logits` `[B, K, V]`, before any warping:
    top-k of one would otherwise make every guess look certain."""
    wide = logits.float()
    return (wide.gather(-1, tokens[..., None]).squeeze(-1) - wide.logsumexp(-1)).exp()
