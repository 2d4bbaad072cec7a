"""Fused speculation: one forward a round verifies a window and drafts the next (arXiv 2607.05722, quadratic mode;
TiDAR, arXiv 2511.08923). It is a layout: the window's clean slots come first, so that a commit keeps a prefix of them,
and behind them stand as many private streams of masks. Stream a is the next window in case a drafts are accepted: it
begins behind the token that follows them, which is not known yet and so is a mask too.

Shapes: A active rows, K window slots, W slots of the next window, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from hybrid import Layout
from hybrid.prediction import predictions, without_mask
from hybrid.sampling.loop import Loop


class Fused(Loop):
    """`mode="speculative"` with one forward a round."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reach += self.plan.block_size  # streams look further ahead than a window
        self.next_width = self.width
        self.ahead = self.rows.tokens  # [A, W] the drafts of the next window; slot 0 is never used

    def _streams(self, start: Tensor, count: int) -> Layout:
        """`count` streams of W masks for windows that begin at `start` `[A]`."""
        assumed = torch.arange(count, device=start.device)[:, None]
        begin = start[:, None, None] + assumed + 1
        place = begin + torch.arange(self.next_width, device=start.device)
        stream = (assumed + 1).expand_as(place)
        return Layout.of(place.flatten(1), begin.expand_as(place).flatten(1), stream.flatten(1))

    def _prefill_forward(self, ids: Tensor, layout: Layout, keep: Tensor, end: Tensor) -> Tensor:
        """The prompt carries the first stream, if more than one token is to come."""
        if not (self.rows.limit > end + 1).any():
            return super()._prefill_forward(ids, layout, keep, end)
        stream = self._streams(end - 1, 1)
        masks = ids.new_full((len(ids), self.next_width), self.fill)
        slots = ids.shape[1] + torch.arange(self.next_width, device=ids.device).expand(len(ids), -1)
        logits = self._forward(torch.cat([ids, masks], 1), layout.cat(stream), torch.cat([keep, slots], 1))
        self._look_ahead(logits[:, 1:], stream)
        return logits[:, :1]

    def _look_ahead(self, logits: Tensor, stream: Layout) -> None:
        """Draft the next window from its stream's logits `[A, W, V]`."""
        logits, rows = predictions(logits, stream, self.config), self.rows
        everybody = torch.ones_like(rows.length, dtype=torch.bool)
        logits = self._judged(logits, rows.text, rows.length[:, None].expand(logits.shape[:2]), everybody)
        wanted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        wanted[:, 0] = False
        self.ahead = self.chooser.choose(logits, wanted)
        if self.sampled:
            self.rows = rows._replace(probs=self.chooser.probs(logits[:, 1:]))

    def _step(self) -> None:
        rows, width = self.rows, self.width
        self.next_width = self.plan.window.width() if self.plan.window else width
        place = rows.start[:, None] + self.place[:-1]
        streams = self._streams(rows.start, width)
        masks = rows.tokens.new_full(streams.position.shape, self.fill)
        out = self.model(
            torch.cat([rows.tokens, masks], 1), layout=Layout.causal(place).cat(streams), past_key_values=self.cache,
            logits_to_keep=torch.arange(width, device=place.device), output_hidden_states=True,
        )  # fmt: skip
        everybody = torch.ones_like(rows.length, dtype=torch.bool)
        verdict = self._judged(without_mask(out.logits, self.config), self._written(place), place + 1, everybody)
        found, n = self.accept(rows.tokens[:, 1:], rows.probs, verdict, self.chooser, everybody)
        self._count([False] * len(n))
        self._accepted((n + 1).tolist(), [False] * len(n))
        if self.plan.record:
            self.plan.record.note(self, place + 1, found, verdict, self.place[:-1] <= n[:, None])

        # Which stream comes true is known only now, and only its logits are computed.
        slots = width + n[:, None] * self.next_width + torch.arange(self.next_width, device=n.device)
        hidden = out.hidden_states[-1]
        hidden = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
        stream = Layout(streams.labels.gather(2, (slots - width).expand(4, -1, -1)))
        self.stats.logits += place.numel() + slots.numel()
        self._look_ahead(without_mask(self.model.lm_head(hidden), self.config), stream)
        self._settle(everybody, n + 1, found.gather(1, n[:, None])[:, 0], everybody, everybody)

    def _retire(self, ends: list[int], lengths: list[int]) -> Tensor:
        stay = super()._retire(ends, lengths)
        self.ahead = self.ahead[stay]
        return stay

    def _new_width(self) -> int:
        return self.next_width

    def _open(self, which: Tensor) -> None:
        super()._open(which)
        rows = self.rows
        tokens = torch.cat([rows.tokens[:, :1], self.ahead[:, 1:]], 1)
        self.rows = rows._replace(tokens=tokens, hidden=torch.zeros_like(rows.hidden))
