"""The decode loop: draft a window with forwards that never commit, then settle it with one that does.

A window begins where the cache ends. Rows do not wait for one another: in one forward some are drafted (their
window is noisy) and others settled (it is clean), because a layout may differ from row to row. How a model sees
clean text decides the rest:

    causal  the cache lags one token behind the text; that token, the seed, is the window's first slot
    block   windows lie on the block grid; what is known of a block enters as shown slots
    full    no cache: the window is the whole canvas, and blocks are only an order of reveal

Shapes: A active rows, K window slots, N places of the text buffer, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid import HybridForCausalLM, KVCache, Layout
from hybrid.prediction import predictions, without_mask
from hybrid.sampling.accept import keep_all, verify_greedy, verify_sampled
from hybrid.sampling.choice import Chooser, confidence
from hybrid.sampling.reveal import Canvas, Reveal, everything
from hybrid.sampling.stats import GenerationStats, RowStats


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the loop needs to know of a call."""

    mode: str
    max_new_tokens: int
    block_size: int
    reveal: Reveal
    foreign_reveal: bool
    steps: int | None
    eos: tuple[int, ...]
    chooser: Chooser


class Rows(NamedTuple):
    """The rows that are not finished. `text` holds the mask token behind a row's settled `length`."""

    text: Tensor  # [A, N]
    length: Tensor  # [A] settled tokens
    limit: Tensor  # [A] the length at which the row ends
    start: Tensor  # [A] the window's first place
    end: Tensor  # [A] the place up to which the window may be revealed now
    tokens: Tensor  # [A, K]
    hidden: Tensor  # [A, K]
    confidence: Tensor  # [A, K]
    step: Tensor  # [A] drafts of this window so far
    probs: Tensor  # [A, K-1, V] the law of sampled speculative drafts; empty elsewhere

    def select(self, index: Tensor) -> "Rows":
        return Rows(*(x[index] for x in self))


class Loop:
    """One `generate` over left-packed prompts."""

    def __init__(self, model: HybridForCausalLM, plan: Plan, text: Tensor, lengths: list[int], cache: KVCache) -> None:
        """`text`: int64 `[B, T]`, each row's prompt in its first `lengths[b]` places."""
        self.model, self.config, self.plan, self.cache = model, model.config, plan, cache
        self.clean, device, count = model.config.clean_attention, text.device, len(lengths)
        # Whether a clean pass says what follows the last token.
        self.seeds = self.clean == "causal" or (self.clean == "block" and self.config.diffusion_prediction == "next")
        # Inside a clean block every key depends on the whole block, so only whole ones are committed.
        self.unit = self.config.block_size if self.clean == "block" else 1
        self.speculative = plan.mode == "speculative"
        self.reveal = everything if self.speculative else plan.reveal
        self.chooser = plan.chooser
        self.sampled = self.chooser.warp is not None
        self.accept = (verify_sampled if self.sampled else verify_greedy) if self.speculative else keep_all
        # Windows that end with the text may end in different slots of different rows.
        self.to_limit = self.clean == "full" or plan.mode == "diffusion"
        self.by_blocks = self.clean == "full" and plan.mode == "block"
        # Prompt tokens that stand in the first window.
        known = [n if self.clean == "full" else n % self.unit for n in lengths]
        if self.to_limit:
            self.width = max(known) + plan.max_new_tokens
        else:
            self.width = 1 if plan.mode == "ar" else plan.block_size
        self.padded = self.to_limit and len(set(known)) > 1
        self.place = torch.arange(self.width + 1, device=device)
        self.fill = self.config.mask_token_id if self.config.is_hybrid else 0
        self.eos = torch.tensor(plan.eos, device=device, dtype=torch.int64)
        self.prompt = lengths
        self.order = list(range(count))  # which of the caller's rows each row of the cache is
        self.done: dict[int, Tensor] = {}
        self.stats = GenerationStats(plan.mode, [RowStats() for _ in lengths])

        length = torch.tensor(lengths, device=device)
        limit = length + plan.max_new_tokens
        self.room = max(lengths) + plan.max_new_tokens + self.width + 1
        buffer = torch.full((count, self.room), self.fill, dtype=torch.int64, device=device)
        given = torch.arange(text.shape[1], device=device) < length[:, None]
        buffer[:, : text.shape[1]] = text.where(given, self.fill)
        window = torch.zeros(count, self.width, device=device)
        self.rows = Rows(
            text=buffer, length=length, limit=limit, start=torch.zeros_like(length), end=limit,
            tokens=window.long(), hidden=window.bool(), confidence=window, step=torch.zeros_like(length),
            probs=torch.zeros(count, 0, 0, dtype=torch.float64, device=device),
        )  # fmt: skip

    def run(self) -> list[Tensor]:
        """Decode to the end; returns each row's whole text, the prompt included."""
        try:
            if self.clean != "full":
                self._prefill()
            self._open(torch.ones_like(self.rows.length, dtype=torch.bool))
            step = self._next if self.plan.mode == "ar" else self._step
            while len(self.rows.length):
                step()
        except BaseException:
            # A rule or a processor of the caller's failed: the cache goes back to the text that the caller has.
            self._restore_order()
            self.cache.rewind([min(n, m) for n, m in zip(self.cache.lengths, self.prompt, strict=True)])
            raise
        self._restore_order()
        self.stats.finish()
        return [self.done[row] for row in range(len(self.order))]

    def _restore_order(self) -> None:
        """Finished rows were moved behind the others: the caller's cache gets its own order back."""
        self.cache.active = len(self.order)
        if self.order != sorted(self.order):
            self.cache.select(sorted(range(len(self.order)), key=self.order.__getitem__))

    def _prefill(self) -> None:
        """Commit what the cache lacks of the prompts, and take each row's first token where a model gives one."""
        cache, unit, rows = self.cache, self.unit, self.rows
        target = [n // unit * unit for n in self.prompt]
        # A seed is read off the last clean token, which must then pass once more.
        again = [self.seeds and t == n for t, n in zip(target, self.prompt, strict=True)]
        cache.rewind([min(c, t - unit if a else t) for c, t, a in zip(cache.lengths, target, again, strict=True)])
        missing = [t - c for t, c in zip(target, cache.lengths, strict=True)]
        rows = rows._replace(start=torch.tensor(cache.lengths, device=rows.text.device))
        if not any(missing):
            self.rows = rows
            return
        place = rows.start[:, None] + torch.arange(max(missing), device=rows.text.device)
        place = place.clamp(max=self.room - 1)  # a row that lacks less than another runs past its text
        count = torch.tensor(missing, device=rows.text.device)
        layout = Layout.clean(place, self.clean, self.config.block_size)
        if len(set(missing)) > 1:
            layout = layout.where(place < (rows.start + count)[:, None])
        logits = self._forward(rows.text.gather(1, place), layout, keep=(count - 1).clamp(min=0)[:, None])
        cache.commit(missing)
        self.stats.count("prefill")
        self.rows = rows._replace(start=rows.start + count)
        if self.seeds:
            seeded = torch.tensor(again, device=rows.text.device)
            tokens = self.chooser.choose(logits, seeded[:, None])[:, 0]
            for row, free in zip(self.stats.rows, again, strict=True):
                row.free = int(free)
            self._settle(seeded, torch.zeros_like(count), tokens, seeded, torch.zeros_like(seeded))

    def _next(self) -> None:
        """One token for every active row: `_step` without what a window of one slot has no use for."""
        rows = self.rows
        layout = Layout.causal(rows.start[:, None])
        logits = self._forward(rows.tokens, layout, 0)
        self.stats.count("settle")
        for row in self.order[: len(rows.length)]:
            self.stats.rows[row].settle += 1
        token = self.chooser.choose(logits, torch.ones_like(rows.hidden))
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
            self._retire(ends, lengths, finished)

    def _step(self) -> None:
        """One forward for every active row, and what follows from it."""
        rows = self.rows
        hidden = self._revealable(rows)
        drafting = hidden.any(1)
        flags = [False] * len(drafting) if self.width == 1 and not self.to_limit else drafting.tolist()
        layout = self._layout(rows, drafting, flags)
        # A window that stands as it is only needs to say what follows it.
        keep = 1 if self.accept is keep_all and not any(flags) else 0
        logits = self._forward(rows.tokens, layout, keep)
        self.stats.count("draft" if all(flags) else "settle")
        for row, flag in zip(self.order, flags, strict=False):
            if flag:
                self.stats.rows[row].draft += 1
            else:
                self.stats.rows[row].settle += 1

        settled = ~drafting
        kept = rows.end - rows.start
        bonus = torch.zeros_like(kept)
        if not all(flags):
            tokens, n = self.accept(rows.tokens[:, 1:], rows.probs, logits, self.chooser, settled)
            kept = torch.where(settled, n + 1, kept)
            bonus = tokens.gather(1, n[:, None])[:, 0]
            if self.speculative:
                for row, flag, gained in zip(self.order, flags, kept.tolist(), strict=False):
                    if not flag:
                        self.stats.rows[row].accepted.append(gained)
        if any(flags):
            self._draft(hidden, drafting, layout, logits)
        closed = drafting & self._closed() if any(flags) else torch.zeros_like(drafting)
        self._settle(settled | closed, kept, bonus, settled & self.seeds, settled)

    def _forward(self, tokens: Tensor, layout: Layout, keep: int | Tensor) -> Tensor:
        cache = None if self.clean == "full" else self.cache
        out = self.model(tokens, layout=layout, past_key_values=cache, logits_to_keep=keep)
        return without_mask(out.logits, self.config)

    def _layout(self, rows: Rows, drafting: Tensor, flags: list[bool]) -> Layout:
        place = rows.start[:, None] + self.place[:-1]
        if self.clean == "full":
            layout = Layout.bidirectional(place)
        elif all(flags):
            layout = Layout.window(place)
        else:
            layout = Layout.clean(place, self.clean, self.config.block_size)
            if any(flags):
                layout = Layout.window(place).choose(drafting, layout)
        return layout.where(place < rows.limit[:, None]) if self.padded else layout

    def _revealable(self, rows: Rows) -> Tensor:
        if self.clean != "full":
            return rows.hidden
        return rows.hidden & (self.place[:-1] < rows.end[:, None])

    def _draft(self, hidden: Tensor, drafting: Tensor, layout: Layout, logits: Tensor) -> None:
        """Let the reveal rule show some of what is hidden in the rows that are being drafted."""
        rows, logits = self.rows, predictions(logits, layout, self.config)
        hidden = hidden & drafting[:, None]
        guess = self.chooser.choose(logits, hidden)
        canvas = Canvas(
            tokens=rows.tokens, hidden=hidden, confidence=rows.confidence, guess=guess,
            certainty=confidence(logits, guess), step=rows.step, steps=self.plan.steps or self.width,
            draws=self.chooser.draws,
        )  # fmt: skip
        tokens, left = self.reveal(canvas, logits)
        fresh = canvas.hidden & ~left
        if self.plan.foreign_reveal:
            _check_shown(canvas, tokens, fresh, self.fill)
        self.rows = rows._replace(tokens=tokens,
            hidden=rows.hidden & ~fresh,
            confidence=torch.where(fresh, canvas.certainty, rows.confidence),
            step=rows.step + drafting,
        )
        if self.speculative and self.sampled:
            law = self.chooser.probs(logits[:, 1:])
            old = rows.probs if rows.probs.numel() else law
            self.rows = self.rows._replace(probs=torch.where(drafting[:, None, None], law, old))

    def _closed(self) -> Tensor:
        """bool `[A]`: rows whose window is drafted and needs no settle pass, because nothing is to be
        verified or to follow."""
        rows = self.rows
        complete = ~self._revealable(rows).any(1)
        if self.clean == "full":
            return complete
        if self.speculative:
            return torch.zeros_like(complete)
        place = rows.start[:, None] + self.place[:-1]
        over = (torch.isin(rows.tokens, self.eos) & (place >= rows.length[:, None])).any(1)
        return complete & (over | (rows.end >= rows.limit))

    def _settle(self, which: Tensor, kept: Tensor, bonus: Tensor, has_bonus: Tensor, clean: Tensor) -> None:
        """Move the first `kept` window tokens of the rows in `which` to their text, and the token that follows
        where there is one; commit what was `clean` in the last forward, retire rows that end, open new windows.

        Nothing is kept behind an end-of-text token or a row's limit, in the text or in the cache.
        """
        rows = self.rows
        place = rows.start[:, None] + self.place
        new = torch.cat([rows.tokens, bonus[:, None]], 1).scatter(1, kept[:, None], bonus[:, None])
        length = torch.minimum(rows.start + kept + has_bonus, rows.limit)
        over = torch.isin(new, self.eos) & (place >= rows.length[:, None]) & (place < length[:, None])
        stop = torch.where(over, place, rows.text.shape[1]).amin(1) + 1
        length = torch.where(which, torch.minimum(length, stop), rows.length)
        new = new.where(place < length[:, None], self.fill)
        text = rows.text.scatter(1, place, new.where(which[:, None], rows.text.gather(1, place)))
        commit = torch.where(clean, torch.minimum(kept, length - rows.start), 0) // self.unit * self.unit
        finished = which & (over.any(1) | (length >= rows.limit))
        self.rows = rows._replace(text=text, length=length, start=rows.start + commit)
        commits, ends, lengths = torch.stack([commit, finished.long(), length]).tolist()
        self.cache.commit(commits)
        if any(n > self.prompt[row] for n, row in zip(lengths, self.order, strict=False)):
            self.stats.first_token()
        if any(ends):
            which = self._retire(ends, lengths, which)
        self._open(which)

    def _retire(self, ends: list[int], lengths: list[int], which: Tensor) -> Tensor:
        """Take finished rows out of the batch; they rest behind the active ones in the cache."""
        for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            if end:
                self.done[self.order[row]] = self.rows.text[row, :length]
                self.stats.rows[self.order[row]].tokens = length - self.prompt[self.order[row]]
        stay = [row for row, end in enumerate(ends) if not end]
        index = torch.tensor(stay, device=which.device, dtype=torch.int64)
        self.rows, self.chooser = self.rows.select(index), self.chooser.select(stay)
        if stay:  # else the batch is done, and nothing need move
            moved = stay + [row for row in range(len(self.order)) if row not in set(stay)]
            self.cache.select(moved)
            self.order = [self.order[row] for row in moved]
        self.cache.active = len(stay)
        return which[index]

    def _open(self, which: Tensor) -> None:
        """Lay new windows over the text of the rows in `which`."""
        rows = self.rows
        place = rows.start[:, None] + self.place[:-1]
        hidden = place >= rows.length[:, None]
        if self.to_limit:
            hidden &= place < rows.limit[:, None]
        end = rows.length + self.plan.block_size if self.by_blocks else rows.start + self.width
        fresh = which[:, None]
        self.rows = rows._replace(end=torch.where(which, torch.minimum(end, rows.limit), rows.end),
            tokens=torch.where(fresh, rows.text.gather(1, place), rows.tokens),
            hidden=torch.where(fresh, hidden, rows.hidden),
            confidence=torch.where(fresh, 1.0, rows.confidence),
            step=torch.where(which, 0, rows.step),
        )


def _check_shown(canvas: Canvas, tokens: Tensor, fresh: Tensor, mask_token_id: int) -> None:
    """A user's rule must show something in every row, or decoding would never end, and no mask tokens."""
    if (canvas.hidden.any(1) & ~fresh.any(1)).any():
        raise ValueError("reveal: the rule showed nothing in a row; a row with hidden slots must show at least one.")
    if (fresh & (tokens == mask_token_id)).any():
        raise ValueError("reveal: the rule showed a mask token; show tokens such as canvas.guess.")
