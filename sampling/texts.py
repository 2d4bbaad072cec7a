"""The texts of one call: what is settled of each, and the window that is open behind it.

Shapes: A active rows, K window slots, N places of the text buffer.
"""

import torch
from torch import Tensor

from hybrid import HybridConfig, KVCache
from hybrid.sampling.reveal import everything
from hybrid.sampling.state import Plan, Rows
from hybrid.sampling.stats import GenerationStats, RowStats


class Texts:
    """Rows that grow, each at its own pace, until they end; the cache follows them."""

    def __init__(self, config: HybridConfig, plan: Plan, text: Tensor, lengths: list[int], cache: KVCache) -> None:
        """`text`: int64 `[B, T]`, each row's text in its first places; of it, `lengths[b]` tokens are settled."""
        self.config, self.plan, self.cache, self.chooser = config, plan, cache, plan.chooser
        self.clean, device, count = config.clean_attention, text.device, len(lengths)
        self.infill, self.speculative = plan.mode == "infill", plan.mode == "speculative"
        # Inside a clean block every key depends on the whole block, so only whole ones are committed.
        self.unit = config.block_size if self.clean == "block" else 1
        self.reveal = everything if self.speculative else plan.reveal
        # Windows that end with the text may end in different slots of different rows.
        self.to_limit = self.clean == "full" or plan.mode == "diffusion" or self.infill
        begin = [0 if self.clean == "full" else n // self.unit * self.unit for n in lengths]
        spans = [limit - b for limit, b in zip(plan.limits, begin, strict=True)]
        width = max(spans) if self.to_limit else 1 if plan.mode == "ar" else plan.block_size
        self.padded = self.to_limit and len(set(spans)) > 1
        self.fill = config.mask_token_id if config.mask_token_id is not None else 0
        self.eos = torch.tensor(plan.eos, device=device, dtype=torch.int64)
        self.prompt = lengths
        self.order = list(range(count))  # which of the caller's rows each row of the cache is
        self.done: dict[int, Tensor] = {}
        self.stats = GenerationStats(plan.mode, [RowStats() for _ in lengths], cache=plan.cache)

        length, limit = (torch.tensor(x, device=device) for x in (lengths, plan.limits))
        self.room = max(plan.limits) + width + 1
        buffer = torch.full((count, self.room), self.fill, dtype=torch.int64, device=device)
        given = torch.arange(text.shape[1], device=device) < (limit if self.infill else length)[:, None]
        buffer[:, : text.shape[1]] = text.where(given, self.fill)
        self.gaps = (text.where(given, -1) == self.fill).sum(1).tolist() if self.infill else []
        empty = torch.zeros(count, 0, device=device)
        self.rows = Rows(
            text=buffer, length=length, limit=limit, start=torch.zeros_like(length), end=limit, tokens=empty.long(),
            hidden=empty.bool(), confidence=empty, step=torch.zeros_like(length), order=empty.double(),
            probs=empty.double()[..., None],
        )  # fmt: skip
        self._widen(width)

    def _widen(self, width: int) -> None:
        """Windows of `width` slots from the next one on; all rows must open one."""
        self.width = width
        self.place = torch.arange(width + 1, device=self.rows.text.device)
        like = self.rows.length[:, None].expand(-1, width)
        self.rows = self.rows._replace(
            tokens=like, hidden=torch.zeros_like(like, dtype=torch.bool), confidence=like.float(), order=like.double()
        )

    def _settle(self, which: Tensor, kept: Tensor, bonus: Tensor, has_bonus: Tensor, clean: Tensor) -> Tensor:
        """Move the first `kept` window tokens of the rows in `which` to their text, and the token that follows
        where there is one; commit what was `clean` in the last forward, retire rows that end, open new windows.

        Nothing is kept behind an end-of-text token, a stop or a row's limit, in the text or in the cache.

        Returns:
            int64, the rows that go on.
        """
        rows = self.rows
        place = rows.start[:, None] + self.place
        new = torch.cat([rows.tokens, bonus[:, None]], 1).scatter(1, kept[:, None], bonus[:, None])
        length = torch.minimum(rows.start + kept + has_bonus, rows.limit)
        over = torch.isin(new, self.eos) & (place >= rows.length[:, None]) & (place < length[:, None])
        stop = torch.where(over, place, rows.text.shape[1]).amin(1) + 1
        length = torch.where(which, torch.minimum(length, stop), rows.length)
        finished = which & (over.any(1) | (length >= rows.limit))
        old = rows.text.gather(1, place)
        if self.plan.halt:
            length, halted = self.plan.halt(rows.text.scatter(1, place, new), rows.length, length)
            finished |= halted
        if not self.infill:
            new = new.where(place < length[:, None], self.fill)
        else:
            new = new.where(place < length[:, None], old)
        text = rows.text.scatter(1, place, new.where(which[:, None], old))
        commit = torch.where(clean, torch.minimum(kept, length - rows.start), 0) // self.unit * self.unit
        self.rows = rows._replace(text=text, length=length, start=rows.start + commit)
        if self.plan.record:
            self.plan.record.settled(self, rows.length)
        commits, ends, lengths = torch.stack([commit, finished.long(), length]).tolist()
        self.cache.commit(commits)
        if any(n > self.prompt[row] for n, row in zip(lengths, self.order, strict=False)):
            self.stats.first_token()
        stay = self._retire(ends, lengths) if any(ends) else torch.arange(len(which), device=which.device)
        which = which[stay]
        if self.plan.window and len(which) and which.all() and (width := self._new_width()) != self.width:
            self._widen(width)
        self._open(which)
        return stay

    def _retire(self, ends: list[int], lengths: list[int]) -> Tensor:
        """Take finished rows out of the batch; they rest behind the active ones in the cache."""
        for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            if end:
                mine = self.order[row]
                self.done[mine] = self.rows.text[row, :length]
                self.stats.rows[mine].tokens = self.gaps[mine] if self.infill else length - self.prompt[mine]
        stay = [row for row, end in enumerate(ends) if not end]
        index = torch.tensor(stay, device=self.rows.text.device, dtype=torch.int64)
        self.rows, self.chooser = self.rows.select(index), self.chooser.select(stay)
        if stay:  # else the batch is done, and nothing need move
            moved = stay + [row for row in range(len(self.order)) if row not in set(stay)]
            self.cache.select(moved)
            self.order = [self.order[row] for row in moved]
        self.cache.active = len(stay)
        return index

    def _new_width(self) -> int:
        assert self.plan.window is not None
        return self.plan.window.width()

    def _open(self, which: Tensor) -> None:
        """Lay new windows over the text of the rows in `which`."""
        rows = self.rows
        place = rows.start[:, None] + self.place[:-1]
        tokens = rows.text.gather(1, place)
        hidden = tokens == self.fill if self.infill else place >= rows.length[:, None]
        if self.to_limit:
            hidden &= place < rows.limit[:, None]
        end = rows.limit if self.plan.by_blocks else rows.start + self.width
        if self.plan.by_blocks:
            end = torch.where(hidden, place, self.room).amin(1) + self.plan.block_size
            more = (hidden & (place >= end[:, None])).any(1)
            end = torch.where(more, end, rows.limit)
        order = rows.order
        if getattr(self.reveal, "in_order", False):
            order = torch.where(which[:, None], self.chooser.draws.uniform(hidden & which[:, None]), order)
        fresh = which[:, None]
        self.rows = rows._replace(
            end=torch.where(which, torch.minimum(end, rows.limit), rows.end),
            tokens=torch.where(fresh, tokens, rows.tokens),
            hidden=torch.where(fresh, hidden, rows.hidden),
            confidence=torch.where(fresh, 1.0, rows.confidence),
            step=torch.where(which, 0, rows.step),
            order=order,
        )

    def _restore_order(self) -> None:
        """Finished rows were moved behind the others: the caller's cache gets its own order back."""
        self.cache.active = len(self.order)
        if self.order != sorted(self.order):
            self.cache.select(sorted(range(len(self.order)), key=self.order.__getitem__))
