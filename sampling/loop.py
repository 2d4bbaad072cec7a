"""The decode loop: draft a window with forwards that never commit, then settle it with one that does.

A window begins where the cache ends. Rows do not wait for one another: in one forward some are drafted (their
window is noisy) and others settled (it is clean), because a layout may differ from row to row. How a model sees
clean text decides the rest:

    causal  the cache lags one token behind the text; that token, the seed, is the window's first slot
    block   windows lie on the block grid; what is known of a block enters as shown slots; the forward that settles a
            block drafts the next one beside it
    full    no cache: the window is the whole canvas, and blocks are only an order of reveal

Shapes: A active rows, K window slots, N places of the text buffer, V vocabulary.
"""

import torch
from torch import Tensor

from hybrid import HybridForCausalLM, KVCache, Layout
from hybrid.prediction import predictions, without_mask
from hybrid.sampling.accept import keep_all, verify_greedy, verify_sampled
from hybrid.sampling.choice import confidence
from hybrid.sampling.reveal import Canvas, checked
from hybrid.sampling.state import Plan, Rows
from hybrid.sampling.texts import Texts


class Loop(Texts):
    """One call over left-packed prompts."""

    def __init__(self, model: HybridForCausalLM, plan: Plan, text: Tensor, lengths: list[int], cache: KVCache) -> None:
        """`text`: int64 `[B, T]`, each row's text in its first places; of it, `lengths[b]` tokens are settled."""
        super().__init__(model.config, plan, text, lengths, cache)
        self.model, self.cached = model, self.clean != "full"
        # Whether a clean pass says what follows the last token.
        next_token = self.clean == "causal" or (
            self.clean == "block" and self.config.diffusion_prediction == "next"
        )
        self.seeds = next_token and not self.infill
        self.sampled = self.chooser.warp is not None
        self.accept = (verify_sampled if self.sampled else verify_greedy) if self.speculative else keep_all
        self.carries = self.clean == "block" and plan.mode == "block" and not next_token
        self.reach = self.room + (self.width if self.carries else 0)  # positions below this come up

    def run(self) -> list[Tensor]:
        """Decode to the end; returns each row's whole text, the prompt included."""
        try:
            if self.clean != "full":
                self._prefill()
            self._open(torch.ones_like(self.rows.length, dtype=torch.bool))
            plain = self.plan.mode == "ar" and not (self.plan.halt or self.plan.record)
            while len(self.rows.length):
                if plain:
                    self._next()
                else:
                    self._step()
        except BaseException:
            # A rule or a processor of the caller's failed: the cache goes back to the text that the caller has.
            self._restore_order()
            self.cache.rewind([min(n, m) for n, m in zip(self.cache.lengths, self.prompt, strict=True)])
            raise
        self._restore_order()
        self.stats.finish()
        return [self.done[row] for row in range(len(self.order))]

    # --- Forwards ---------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """Commit what the cache lacks of the prompts, and take each row's first token where a model gives one."""
        cache, unit, rows = self.cache, self.unit, self.rows
        target = [n // unit * unit for n in self.prompt]
        # A seed is read off the last clean token, which must then pass once more.
        again = [self.seeds and t == n for t, n in zip(target, self.prompt, strict=True)]
        cache.rewind([min(c, t - unit if a else t) for c, t, a in zip(cache.lengths, target, again, strict=True)])
        missing = [t - c for t, c in zip(target, cache.lengths, strict=True)]
        rows = self.rows = rows._replace(start=torch.tensor(cache.lengths, device=rows.text.device))
        if not any(missing):
            return
        place = rows.start[:, None] + torch.arange(max(missing), device=rows.text.device)
        place = place.clamp(max=self.room - 1)  # a row that lacks less than another runs past its text
        count = torch.tensor(missing, device=rows.text.device)
        layout = Layout.clean(place, self.clean, self.config.block_size)
        if len(set(missing)) > 1:
            layout = layout.where(place < (rows.start + count)[:, None])
        ids, keep = rows.text.gather(1, place), (count - 1).clamp(min=0)[:, None]
        logits = self._prefill_forward(ids, layout, keep if self.seeds else keep[:, :0], rows.start + count)
        cache.commit(missing)
        self.stats.count("prefill")
        self.rows = self.rows._replace(start=rows.start + count)
        if self.seeds:
            self._seed(logits, torch.tensor(again, device=rows.text.device))

    def _prefill_forward(self, ids: Tensor, layout: Layout, keep: Tensor, end: Tensor) -> Tensor:
        return self._forward(ids, layout, keep)

    def _seed(self, logits: Tensor, seeded: Tensor) -> None:
        """Each row's first token, from the last slot of its prompt `[A, 1, V]`, in the rows `seeded`."""
        rows, none = self.rows, torch.zeros_like(self.rows.length)
        logits = self._judged(logits, rows.text, rows.length[:, None], seeded)
        tokens = self.chooser.choose(logits, seeded[:, None])[:, 0]
        for row, free in zip(self.stats.rows, seeded.tolist(), strict=True):
            row.free = int(free)
        if self.plan.record:
            self.plan.record.note(self, rows.length[:, None], tokens[:, None], logits, seeded[:, None])
        self._settle(seeded, none, tokens, seeded, none.bool())

    def _next(self) -> None:
        """One token for every active row: `_step` without what a window of one slot has no use for."""
        rows = self.rows
        logits = self._forward(rows.tokens, Layout.causal(rows.start[:, None]), 0)
        self._count([False] * len(rows.length))
        everybody = torch.ones_like(rows.hidden)
        logits = self._judged(logits, rows.text, rows.length[:, None], everybody[:, 0])
        token = self.chooser.choose(logits, everybody)
        self.cache.commit(1)
        length = rows.length + 1
        text = rows.text.scatter_(1, rows.length[:, None], token)
        self.rows = rows._replace(text=text, length=length, start=rows.length, tokens=token)
        finished = length >= rows.limit
        if len(self.eos):
            finished |= torch.isin(token[:, 0], self.eos)
        self.stats.first_token()
        ends, lengths = torch.stack([finished.long(), length]).tolist()
        if any(ends):
            self._retire(ends, lengths)

    def _step(self) -> None:
        """One forward for every active row, and what follows from it."""
        rows = self.rows
        hidden = self._revealable(rows)
        drafting = hidden.any(1)
        flags = drafting.tolist()
        place = rows.start[:, None] + self.place[:-1]
        layout, tokens = self._layout(place, drafting, flags), rows.tokens
        wanted = self._wanted(layout, hidden, drafting)
        carrying = self.carries and not all(flags)
        if carrying:
            # What is settled is known already, so the next block is drafted beside it.
            ahead = Layout.window(place + self.width).where(~drafting[:, None])
            layout, tokens = layout.cat(ahead), torch.cat([tokens, torch.full_like(tokens, self.fill)], 1)
            wanted = torch.cat([wanted, ~drafting[:, None].expand_as(wanted)], 1)
        logits = self._forward_wanted(tokens, layout, wanted)
        self._count(flags)

        settled = ~drafting
        kept = rows.end - rows.start
        bonus = torch.zeros_like(kept)
        if not all(flags) and (self.seeds or self.speculative):
            verdict = self._judged(logits[:, : self.width], self._written(place), place + 1, settled)
            found, n = self.accept(rows.tokens[:, 1:], rows.probs, verdict, self.chooser, settled)
            kept = torch.where(settled, n + 1, kept)
            bonus = found.gather(1, n[:, None])[:, 0]
            if self.speculative:
                self._accepted(kept.tolist(), flags)
            if self.plan.record:
                fresh = settled[:, None] & (self.place[:-1] <= n[:, None])
                if not self.speculative:
                    fresh &= self.place[:-1] == n[:, None]
                self.plan.record.note(self, place + 1, found, verdict, fresh)
        closed = self._draft(hidden, drafting, layout, logits[:, : self.width]) if any(flags) else drafting
        stay = self._settle(settled | closed, kept, bonus, settled & self.seeds, settled)
        if carrying and len(self.rows.length):
            carried, logits = settled[stay], logits[stay][:, self.width :]
            ahead = Layout.window(self.rows.start[:, None] + self.place[:-1])
            closed = self._draft(self.rows.hidden & carried[:, None], carried, ahead, logits)
            if closed.any():
                nothing = torch.zeros_like(closed)
                kept = self.rows.end - self.rows.start
                self._settle(closed, kept, torch.zeros_like(kept), nothing, nothing)

    def _layout(self, place: Tensor, drafting: Tensor, flags: list[bool]) -> Layout:
        if self.clean == "full":
            layout = Layout.bidirectional(place)
        elif all(flags):
            layout = Layout.window(place)
        else:
            layout = Layout.clean(place, self.clean, self.config.block_size)
            if any(flags):
                layout = Layout.window(place).choose(drafting, layout)
        return layout.where(place < self.rows.limit[:, None]) if self.padded else layout

    def _wanted(self, layout: Layout, hidden: Tensor, drafting: Tensor) -> Tensor:
        """bool `[A, K]`: the slots whose logits somebody reads."""
        if self.config.diffusion_prediction == "next":  # a slot is read off the row before it
            first = (layout.position == layout.block).expand_as(hidden)
            hidden = (hidden & ~first).roll(-1, 1) | (hidden & first)
        settled = ~drafting[:, None]
        if self.speculative:
            return hidden | settled
        last = self.place[:-1] == self.width - 1
        return hidden | (settled & last) if self.seeds else hidden

    def _forward_wanted(self, tokens: Tensor, layout: Layout, wanted: Tensor) -> Tensor:
        """Logits `[A, T, V]`, computed where `wanted` and zero elsewhere."""
        count = int(wanted.sum(1).max())
        if count == wanted.shape[1]:
            return self._forward(tokens, layout, 0)
        index = (~wanted).long().argsort(dim=1, stable=True)[:, :count]
        some = self._forward(tokens, layout, index)
        out = some.new_zeros((*wanted.shape, some.shape[-1]))
        return out.scatter_(1, index[..., None].expand_as(some), some)

    def _forward(self, tokens: Tensor, layout: Layout, keep: int | Tensor) -> Tensor:
        cache = self.cache if self.cached else None
        out = self.model(tokens, layout=layout, past_key_values=cache, logits_to_keep=keep)
        self.stats.logits += out.logits.shape[0] * out.logits.shape[1]
        return without_mask(out.logits, self.config)

    def _count(self, flags: list[bool]) -> None:
        """Enter a forward that drafted the rows with a flag and settled the others."""
        self.stats.count("draft" if all(flags) else "settle")
        for row, flag in zip(self.order, flags, strict=False):
            if flag:
                self.stats.rows[row].draft += 1
            else:
                self.stats.rows[row].settle += 1
            if self.plan.record:
                self.plan.record.kinds[row] = "draft" if flag else "settle"

    def _accepted(self, kept: list[int], flags: list[bool]) -> None:
        """Enter what a speculative round gained, and let the window follow."""
        for row, flag, gained in zip(self.order, flags, kept, strict=False):
            if not flag:
                self.stats.rows[row].accepted.append(gained)
        if self.plan.window:
            self.plan.window.saw(self.width, kept)

    # --- Drafts -----------------------------------------------------------------------------------

    def _judged(self, logits: Tensor, text: Tensor, ends: Tensor, which: Tensor) -> Tensor:
        """What processors make of logits `[A, S, V]` in the rows `which`, slot s following `text[:ends[s]]`."""
        if not self.chooser.processors:
            return logits
        return without_mask(self.chooser.process(logits, text, ends, which), self.config)

    def _written(self, place: Tensor) -> Tensor:
        """The texts with the windows in them."""
        return self.rows.text.scatter(1, place, self.rows.tokens)

    def _revealable(self, rows: Rows) -> Tensor:
        if not self.plan.by_blocks:
            return rows.hidden
        return rows.hidden & (self.place[:-1] < (rows.end - rows.start)[:, None])

    def _draft(self, hidden: Tensor, drafting: Tensor, layout: Layout, logits: Tensor) -> Tensor:
        """Let the reveal rule show some of what is hidden in the rows that are being drafted; returns those whose
        window needs no settle pass now, because nothing is to be verified or to follow."""
        rows, logits = self.rows, predictions(logits, layout, self.config)
        place = rows.start[:, None] + self.place[:-1]
        # Processors see what is settled, and no drafts.
        logits = self._judged(logits, rows.text, rows.length[:, None].expand_as(place), drafting)
        guess = self.chooser.choose(logits, hidden & drafting[:, None])
        hidden = hidden & drafting[:, None]
        may = drafting[:, None] & (place < rows.end[:, None]) & (place >= rows.length[:, None]) & ~rows.hidden
        if self.infill:
            may &= rows.text.gather(1, place) == self.fill
        canvas = Canvas(
            tokens=rows.tokens, hidden=hidden, drafted=may, confidence=rows.confidence, guess=guess,
            certainty=confidence(logits, guess), step=rows.step, steps=self.plan.steps or self.width,
            order=rows.order, draws=self.chooser.draws, mask_token_id=self.fill,
        )  # fmt: skip
        tokens, left = self.reveal(canvas, logits)
        if self.plan.foreign_reveal:
            checked(canvas, tokens, left)
        fresh, again = hidden & ~left, left & canvas.drafted
        # A sample that nobody is shown must not leave a mark: rows of a batch stay the rows alone.
        self.rows = rows._replace(
            tokens=tokens.where(fresh | again, rows.tokens),
            hidden=(rows.hidden & ~fresh) | again,
            confidence=torch.where(fresh, canvas.certainty, rows.confidence),
            step=rows.step + drafting,
        )
        if self.speculative and self.sampled:
            law = self.chooser.probs(logits[:, 1:])
            old = rows.probs if rows.probs.shape == law.shape else law
            self.rows = self.rows._replace(probs=torch.where(drafting[:, None, None], law, old))
        if self.plan.record:
            self.plan.record.note(self, place, tokens, logits, fresh)
        return drafting & self._closed()

    def _closed(self) -> Tensor:
        rows = self.rows
        complete = ~self._revealable(rows).any(1)
        if self.clean == "full" or self.infill:
            return complete
        if self.speculative:
            return torch.zeros_like(complete)
        place = rows.start[:, None] + self.place[:-1]
        over = (torch.isin(rows.tokens, self.eos) & (place >= rows.length[:, None])).any(1)
        return complete & (over | (rows.end >= rows.limit))

