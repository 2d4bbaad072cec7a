"""What is written down of every token when it is revealed, and who is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hybrid.common.renamed import renamed_attribute
from hybrid.sampling.choosing.choice import Warp, confidence

if TYPE_CHECKING:
    from hybrid.sampling.row import Row


class Chance(NamedTuple):
    """What a model made of a token when it was revealed, processors included and warping not.

    Attributes:
        log_prob: of the token.
        likeliest: token ids that were likeliest then, and their log-probabilities; the highest first.
    """

    log_prob: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward did to one row.

    Attributes:
        forward: its number in the call, prefill being the first.
        kind: what the row got: "prefill", "draft" or "settle".
        row: of the caller's batch.
        position: in the text, of the first token of `settled`, or of `window` where that is empty.
        settled: tokens that are final since this forward.
        window: drafts behind them: token ids, or None where the slot is still hidden.
        confidence: the model's probability of each settled token, then of each of the window, when it was revealed.
        chances: of the settled tokens, where the request asked for `likeliest`.
    """

    forward: int
    kind: str
    row: int
    position: int
    settled: list[int]
    window: list[int | None]
    confidence: list[float]
    chances: Sequence[Chance] = ()

    place = renamed_attribute("place", "position")


Watcher = Callable[[Sequence[Step]], object]


class Record:
    """Log-probabilities and scores of one row's revealed tokens, for those who ask for them or watch."""

    likeliest: int | None = None  # so many tokens are written down beside each
    wants_prompt = False  # and beside each of the prompt, too

    def __init__(self, begin: int, limit: int, scores: bool, warp: Warp | None) -> None:
        """`begin`, `limit`: where the new text begins, and ends at the latest."""
        self.begin, self.want_scores, self.warp = begin, scores, warp
        self.chance = [1.0] * (limit - begin)
        self.scores: dict[int, Tensor] = {}  # by the position behind `begin`: [V], processed and warped
        self.chances: dict[int, Chance] = {}  # by the position in the text

    def note(self, positions: Sequence[int], tokens: Sequence[int], logits: Tensor) -> None:
        """Enter tokens at `positions` of the text that were revealed by logits `[n, V]`."""
        chances = confidence(logits, torch.tensor(tokens, device=logits.device)).tolist()
        laws = logits.float() if self.want_scores else None
        if laws is not None and self.warp is not None and len(laws):
            laws = self.warp(laws)
        for i, position in enumerate(positions):
            if position - self.begin < len(self.chance):  # windows are drafted at full size; texts end where they end
                self.chance[position - self.begin] = chances[i]
                if laws is not None:
                    self.scores[position - self.begin] = laws[i].cpu()
        if self.likeliest is not None:
            self.enter(positions, tokens, logits)

    def enter(self, positions: Sequence[int], tokens: Sequence[int], logits: Tensor) -> None:
        """Write down the chances of tokens at `positions` of the text, the prompt's or later."""
        wide = logits.float()
        best = wide.topk(min(self.likeliest or 0, wide.shape[-1]), -1)
        total = wide.logsumexp(-1, keepdim=True)
        own = wide.gather(-1, torch.tensor(tokens, device=wide.device)[:, None])
        found = ((own - total).squeeze(-1), best.indices, best.values - total)
        for position, log_prob, ids, logs in zip(positions, *(x.tolist() for x in found), strict=True):
            self.chances[position] = Chance(log_prob, list(zip(ids, logs, strict=True)))

    def log_probs(self, count: int) -> list[float]:
        """Of the first `count` new tokens."""
        return torch.tensor(self.chance[:count]).log().tolist()


def step_of(row: "Row", forward: int, kind: str, drafts: Sequence[int | None]) -> Step:
    """What the last forward did to a row: what is final since then, and `drafts` behind it, or what is drafted."""
    record, begin, end = row.record, row.before, row.length
    assert record is not None
    window: list[int | None] = [] if row.finished else list(drafts[: row.limit - end])
    if begin == end:
        # The window stands behind the settled text; its first slots may be that text.
        known = end - row.start
        pairs = zip(row.tokens[known:], row.hidden[known:], strict=True)
        window = [None if hidden else token for token, hidden in pairs][: row.limit - end]
    chances = record.chance[begin - record.begin : end - record.begin + len(window)]
    return Step(
        forward=forward, kind=kind, row=row.index, position=begin, settled=row.text[begin:end], window=window,
        confidence=chances, chances=[record.chances[i] for i in range(begin, end) if i in record.chances],
    )  # fmt: skip


def scores_of(records: Sequence[Record], counts: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Scores, one float32 `[B, V]` a new token, and log-probabilities `[B, new]`; rows have `counts` new tokens."""
    new, size = max(counts), max(len(law) for record in records for law in record.scores.values())
    scores, chance = torch.zeros(len(records), new, size), torch.ones(len(records), new)
    for row, (record, count) in enumerate(zip(records, counts, strict=True)):
        chance[row, :count] = torch.tensor(record.chance[:count])
        for position, law in record.scores.items():
            if position < count:
                scores[row, position] = law
    return scores.unbind(1), chance.log()


class Streaming:
    """A transformers streamer as a watcher: settled tokens go to `put`, drafts to `put_draft` where it has one."""

    def __init__(self, streamer: Any, mask_token_id: int) -> None:
        self.streamer, self.fill = streamer, mask_token_id

    def begin(self, prompt: Sequence[int]) -> None:
        """Show the prompt, as transformers does."""
        self.streamer.put(torch.tensor([prompt]))

    def end(self) -> None:
        """Say that it is over."""
        self.streamer.end()

    def __call__(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.settled:
                self.streamer.put(torch.tensor(step.settled))
            if step.window and hasattr(self.streamer, "put_draft"):
                drafts = [self.fill if token is None else token for token in step.window]
                self.streamer.put_draft(torch.tensor(drafts))
