"""Choosing tokens from logits: warped as transformers warps, drawn with the caller's generators.

Shapes: B rows, K slots, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from hybrid.sampling.options.checks import LogitsError

if TYPE_CHECKING:
    from hybrid.sampling.row import Row


@dataclass(frozen=True)
class Warp:
    """transformers' own warpers, in its order: what a law becomes before tokens are drawn from it."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits `[..., V]`."""
        return cast(Tensor, self._warpers(None, logits.flatten(0, -2)).view_as(logits))

    @functools.cached_property
    def _warpers(self) -> LogitsProcessorList:
        found = LogitsProcessorList()
        if self.temperature is not None and self.temperature != 1:
            found.append(theirs.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            found.append(theirs.TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            found.append(theirs.TopPLogitsWarper(self.top_p))
        if self.min_p:
            found.append(theirs.MinPLogitsWarper(self.min_p))
        return found

    def law(self, logits: Tensor) -> Tensor:
        """The law that tokens are drawn from, `[..., V]`, in float64: NaN throughout where there is none."""
        return self(logits).double().softmax(-1)


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


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token at quantile `uniform` `[...]` of `probs` `[..., V]`: float64, so that no tail is cut off.

    Tokens of probability zero are never returned. `probs` need not be normalised.
    """
    total = probs.double().cumsum(-1)
    # Strictly below the end: rounding up to it would pick the last token even if it has no probability.
    end = torch.nextafter(total[..., -1:], torch.zeros_like(total[..., -1:]))
    point = torch.minimum(uniform[..., None] * total[..., -1:], end)
    return torch.searchsorted(total, point, right=True).squeeze(-1)


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """For functions of the caller's: what they make there, a copy of the model say, can be trained afterwards."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def judged(
    rows: Sequence[Row], ends: Sequence[Sequence[int]], logits: Tensor, final: Sequence[int] | None = None
) -> Tensor:
    """Logits `[N, V]` as the processors of each row want them. A row whose processor fails gets the error.

    Args:
        ends: for each logit of a row, how much of its text with the window in it is before the token that is to be
            chosen; hidden slots among them are mask tokens.
        final: how many of each row's first logits say what stays, and not what is only guessed and verified later;
            None: all. A processor of the caller's may keep a state, and is asked for what stays alone.
    """
    if not any(row.processors for row in rows):
        return logits
    out, at = logits.clone(), 0
    for i, (row, own) in enumerate(zip(rows, ends, strict=True)):
        sure = len(own) if final is None else final[i]
        for processors, span in ((row.processors, range(sure)), (row.guessing, range(sure, len(own)))):
            for end in dict.fromkeys(own[j] for j in span) if processors else ():
                same = [at + j for j in span if own[j] == end]
                out[same] = processed(row, processors, end, logits[same])
        at += len(own)
    return rows[0].law.without_mask(out)


def processed(row: Row, processors: LogitsProcessorList, end: int, logits: Tensor) -> Tensor:
    """Logits `[n, V]` as `processors` want them for the token behind the first `end` of a row's text."""
    window = row.text[: row.start] + row.tokens
    text = window if end > row.length and len(window) > row.length else row.text[: max(row.length, end)]
    text = text[:end] + [row.fill] * (end - len(text))
    try:
        with outside():
            ids = torch.tensor([text], device=logits.device).expand(len(logits), -1)
            found: Tensor = processors(ids, logits.clone())
        if found.shape != logits.shape:
            raise ValueError(f"logits_processor: it made {list(found.shape)} of scores {list(logits.shape)}.")
    except Exception as error:  # whatever it raises, the other rows go on
        row.error = error
        return logits
    return found.to(logits.dtype)


def choose(rows: Sequence[Row], counts: Sequence[int], logits: Tensor) -> tuple[list[list[int]], list[Tensor | None]]:
    """A token for each of the logits `[N, V]`, of which `counts` belong to each row: the likeliest, or drawn with the
    row's generator; and the laws `[count, V]` that sampling rows drew from."""
    tokens, laws = likeliest(logits), list[Tensor | None]([None] * len(rows))
    begin = [0, *itertools.accumulate(counts)]
    sampling = [i for i, row in enumerate(rows) if row.plan.warp is not None and counts[i]]
    uniform = {i: torch.tensor(rows[i].uniform(counts[i]), dtype=torch.float64) for i in sampling}
    for warp in dict.fromkeys(rows[i].plan.warp for i in sampling):
        same = [i for i in sampling if rows[i].plan.warp == warp]
        index = torch.cat([torch.arange(begin[i], begin[i + 1]) for i in same]).to(logits.device)
        assert warp is not None
        law = warp.law(logits[index])
        drawn = sample(law, torch.cat([uniform[i] for i in same]).to(logits.device))
        tokens[index] = drawn.where((tokens[index] >= 0) & ~law[:, 0].isnan(), -1)
        for i, part in zip(same, law.split([counts[i] for i in same]), strict=True):
            laws[i] = part
    return named(rows, counts, tokens, logits), laws


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token of each of the logits `[N, V]`; -1 where none follows from them."""
    tokens = logits.argmax(-1)  # of a NaN, if there is one
    return tokens.where(logits.gather(-1, tokens[:, None]).squeeze(-1).isfinite(), -1)


def named(rows: Sequence[Row], counts: Sequence[int], tokens: Tensor, logits: Tensor) -> list[list[int]]:
    """Each row's tokens. A row with one that does not follow from its logits gets the error that says so, and in its
    place a token that the next forward could read."""
    flat, found, at = tokens.tolist(), [], 0
    for row, count in zip(rows, counts, strict=True):
        own = flat[at : at + count]
        if own and min(own) < 0:
            bad = logits[at + own.index(-1)]
            reason = "the logits are not numbers (NaN, or infinite). Look at the weights, the dtype and the processors."
            if bad.amax().isfinite():
                reason = f"divided by a temperature of {row.plan.warp and row.plan.warp.temperature} they are infinite."
            elif (bad == -torch.inf).all():
                reason = "every token is forbidden. Look at the processors, and at what they forbid."
            stats, said = row.stats, "no token could be drawn or chosen: "
            row.error = row.error or LogitsError(row.index, stats.prefill + stats.settle + stats.draft, said + reason)
            own = [max(token, 0) for token in own]
        found.append(own)
        at += count
    return found


def confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """The model's own probability of `tokens` `[B, K]` under `logits` `[B, K, V]`, before any warping:
    top-k of one would otherwise make every guess look certain."""
    wide = logits.float()
    return (wide.gather(-1, tokens[..., None]).squeeze(-1) - wide.logsumexp(-1)).exp()
