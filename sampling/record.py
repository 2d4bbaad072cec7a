"""What is written down of every token when it is revealed, and who is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybrid.sampling.choice import confidence

if TYPE_CHECKING:
    from hybrid.sampling.texts import Texts


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward did to one row.

    Attributes:
        forward: its number in the call, prefill being the first.
        kind: what the row got: "prefill", "draft" or "settle".
        row: of the caller's batch.
        place: where the settled tokens stand in the text.
        settled: tokens that are final since this forward.
        window: drafts behind them: token ids, or None where the slot is still hidden.
        confidence: the model's probability of each settled token, then of each of the window, when it was revealed.
    """

    forward: int
    kind: str
    row: int
    place: int
    settled: list[int]
    window: list[int | None]
    confidence: list[float]


Watcher = Callable[[Sequence[Step]], object]


class Record:
    """Log-probabilities and scores of revealed tokens, and the steps for those who watch."""

    def __init__(
        self, lengths: Sequence[int], limits: Sequence[int], scores: bool, watchers: Sequence[Watcher] = ()
    ) -> None:
        """`lengths`, `limits`: where each row's new text begins, and ends at the latest."""
        self.begin = torch.tensor(lengths)
        self.chance = torch.ones(len(lengths), max(b - a for a, b in zip(lengths, limits, strict=True)))
        self.want_scores, self.watchers = scores, list(watchers)
        self.scores: Tensor | None = None  # [B, new, V]
        self.kinds: dict[int, str] = {}  # what the last forward was for each row; before the first: prefill

    def note(self, texts: "Texts", place: Tensor, tokens: Tensor, logits: Tensor, fresh: Tensor) -> None:
        """Enter tokens `[A, S]` at `place` that were revealed by logits `[A, S, V]` where `fresh`."""
        index, slot = fresh.nonzero(as_tuple=True)
        row = torch.tensor(texts.order[: len(fresh)])[index.cpu()]
        where = place[index, slot].cpu() - self.begin[row]
        keep = where < self.chance.shape[1]  # windows are drafted at full size, and texts end where they end
        row, where, index, slot = row[keep], where[keep], index[keep.to(index.device)], slot[keep.to(slot.device)]
        self.chance[row, where] = confidence(logits, tokens)[index, slot].cpu()
        if self.want_scores:
            laws = logits[index, slot].float()
            if texts.chooser.warp is not None and len(laws):
                laws = texts.chooser.warp(laws)
            if self.scores is None:
                self.scores = torch.zeros(*self.chance.shape, logits.shape[-1])
            self.scores[row, where] = laws.cpu()

    def settled(self, texts: "Texts", before: Tensor) -> None:
        """Tell the watchers what is final since `before` `[A]`, and what is drafted."""
        if not self.watchers:
            return
        rows, steps = texts.rows, []
        lengths, old, starts = rows.length.tolist(), before.tolist(), rows.start.tolist()
        tokens, hidden = rows.tokens.tolist(), rows.hidden.tolist()
        for i, row in enumerate(texts.order[: len(lengths)]):
            begin, end = old[i], lengths[i]
            window: list[int | None] = []
            if begin == end:
                # The window stands behind the settled text; its first slots may be that text.
                known = end - starts[i]
                window = [None if h else t for t, h in zip(tokens[i][known:], hidden[i][known:], strict=True)]
                window = window[: int(rows.limit[i]) - end]
            first = int(self.begin[row])
            chances = self.chance[row, begin - first : end - first + len(window)].tolist()
            steps.append(
                Step(
                    forward=texts.stats.forwards, kind=self.kinds.get(row, "prefill"), row=row, place=begin,
                    settled=rows.text[i, begin:end].tolist(), window=window, confidence=chances,
                )
            )  # fmt: skip
        for watcher in self.watchers:
            watcher(steps)

    def of(self, counts: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Scores, one `[B, V]` a new token, and log-probabilities `[B, new]`; rows have `counts` new tokens."""
        assert self.scores is not None
        new = max(counts)
        real = torch.arange(new) < torch.tensor(counts)[:, None]
        scores = self.scores[:, :new].where(real[..., None], 0.0)
        return scores.unbind(1), self.chance[:, :new].log().where(real, 0.0)


class Streaming:
    """A transformers streamer as a watcher: settled tokens go to `put`, drafts to `put_draft` where it has one."""

    def __init__(self, streamer: Any, prompt: Tensor, mask_token_id: int) -> None:
        """`prompt`: int64 `[1, T]`, which the streamer is shown first."""
        self.streamer, self.fill = streamer, mask_token_id
        streamer.put(prompt.cpu())

    def __call__(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.settled:
                self.streamer.put(torch.tensor(step.settled))
            elif step.window and hasattr(self.streamer, "put_draft"):
                drafts = [self.fill if token is None else token for token in step.window]
                self.streamer.put_draft(torch.tensor(drafts))
