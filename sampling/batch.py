"""A batch: rows of one mode that share a cache and their forwards.

Rows do not wait for one another: in one forward some are drafted (their window is noisy) and others settled (it is
clean), because a layout may differ from row to row. Prompts go in by forwards of their own, in pieces, in turn with
those of the rows that are being decoded.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybrid import Layout
from hybrid.fast.flat import Flat
from hybrid.sampling.engine import Engine, Read
from hybrid.sampling.places import Places
from hybrid.sampling.record import Step, step_of
from hybrid.sampling.row import Row
from hybrid.sampling.schemes import Ar, Outcome, Part
from hybrid.sampling.stats import Kind
from hybrid.sampling.window import guess_price, price

SHORT = 32  # tokens of a piece of a prompt that costs little more than one
JOBS: tuple[Kind, ...] = ("prefill", "settle", "draft")  # a forward counts under the first that it does


class Batch:
    """Rows of one scheme, and which place of the cache each of them has."""

    def __init__(self, engine: Engine, scheme: Ar, places: Places) -> None:
        self.engine, self.scheme, self.law, self.places = engine, scheme, scheme.law, places
        self._told: list[tuple[Row, Step]] = []  # by the forward that is under way
        self._priced: Flat | None = None
        self._costs: dict[tuple[int, int], list[float]] = {}
        self.filled = False  # whether the last forward was one for prompts
        self._long = False  # whether the last of these was for long ones, where there were others

    def add(self, row: Row) -> None:
        """Take a row in; its place of the cache may hold a beginning of its text."""
        self.places.take(row)
        if (cache := self.places.cache) is not None and self.law.cached:
            # A seed is read off the last clean token, which must then pass once more.
            most = row.target - self.law.unit if row.seeded else row.target
            row.start = cache.lengths[row.place] = min(cache.lengths[row.place], most)

    def _round_costs(self, rows: int, widest: int) -> list[float]:
        """Of speculation with so many rows at once, on this machine."""
        flat = self.engine.flat
        if flat is not self._priced:
            self._priced, self._costs = flat, {}
        if (rows, widest) not in self._costs:
            guess = 0.0 if self.engine.head is None else guess_price(flat, rows, self.engine.head_share)
            of_slots = functools.partial(price, flat, rows=rows)
            costs = [self.scheme.round_cost(width, of_slots, guess) for width in range(1, widest + 1)]
            self._costs[rows, widest] = costs
        return self._costs[rows, widest]

    def step(self) -> list[tuple[Row, Step]]:
        """One forward, and what follows from it; returns what it did to each row that keeps a record."""
        self._told = []
        waiting = [row for row in self.places.rows.values() if not row.ready]
        rows = [row for row in self.places.rows.values() if row.ready]
        self.filled = bool(waiting) and (not rows or not self.filled)
        rows = sorted(_neighbours(self._alike(waiting)) if self.filled else rows, key=lambda row: row.index)
        for row in rows:
            if row.window is not None:
                # Others change no text, but where it is sampled, the width says what is drawn for what.
                together = 1 if row.plan.warp is not None else len(self.places.rows)
                row.window.costs = self._round_costs(together, row.window.widest)
            if not (self.filled or row.opened):
                self._guarded(row, row.open, self.scheme.width(row))
                row.opened = True
        parts = [(self.scheme.prefill if self.filled else self.scheme.next)(row) for row in rows]
        read = self._forward(rows, parts)
        self._count(rows, parts)
        outcomes = (self.scheme.first if self.filled else self.scheme.take)(rows, parts, read)
        self._apply(list(zip(rows, parts, outcomes, strict=True)))
        if any(part.ahead for part in parts):
            self._second_turn(rows, parts, read)
        return self._told

    def _alike(self, waiting: Sequence[Row]) -> Sequence[Row]:
        """Those whose next pieces are about equally long, where prompts go in by pieces: a short one is not padded to
        the width of a long one, whose turn comes after it."""
        if (chunk := self.scheme.chunk) is None:
            return waiting
        widths = [min(chunk, row.target - row.start) for row in waiting]
        most = max(SHORT, 2 * min(widths))
        apart = [[row for row, width in zip(waiting, widths, strict=True) if (width > most) == long]
                 for long in (False, True)]  # fmt: skip
        self._long = bool(apart[1]) and not self._long
        return apart[self._long]

    def _forward(self, rows: Sequence[Row], parts: Sequence[Part]) -> Read:
        """Run one forward over the parts; returns what reads it."""
        lanes, starts = list(range(len(rows))), [row.start for row in rows]
        tokens, layouts = [part.tokens for part in parts], [part.layout for part in parts]
        if (cache := self.places.cache) is not None:
            first = min(row.place for row in rows)
            count = max(row.place for row in rows) + 1 - first
            for row, part in zip(rows, parts, strict=True):
                if part.rewind:
                    cache.lengths[row.place] = 0
            lengths = cache.lengths[first : first + count]
            ends = [cache.lengths[row.place] + len(part.tokens) for row, part in zip(rows, parts, strict=True)]
            cache.focus(first, count, max(*lengths, *ends))
            lanes = [row.place - first for row in rows]
            if lanes != list(range(count)):  # some rows rest, or lie in another order
                of = {lane: i for i, lane in enumerate(lanes)}
                # What rests goes along with the others' labels where they are all alike, else it sees nobody.
                like = layouts[0] if len({id(x) for x in layouts}) == 1 else Layout(layouts[0].labels[..., :0])
                layouts = [layouts[of[i]] if i in of else like for i in range(count)]
                tokens = [tokens[of[i]] if i in of else [] for i in range(count)]
                # It is nowhere in particular, so that it is nowhere beyond the positions that are served.
                starts = [starts[of[i]] if i in of else 0 for i in range(count)]
        device, width = self.engine.model.device, max(map(len, tokens))
        ids = torch.tensor([[*own, *[0] * (width - len(own))] for own in tokens], device=device)
        alike = all(layout is layouts[0] for layout in layouts)
        layout = (layouts[0] if alike else Layout.stack(layouts)).moved(torch.tensor(starts))
        if device.type != "cpu":
            layout = Layout(layout.labels.to(device), layout.pattern, layout.seam)
        hidden = self.engine.hidden(ids, layout, cache).flatten(0, 1)
        return Read(self.engine, self.law, hidden, [lane * width for lane in lanes])

    def _count(self, rows: Sequence[Row], parts: Sequence[Part]) -> None:
        self.engine.stats.count(next(job for job in JOBS if any(part.job == job for part in parts)))
        for row, part in zip(rows, parts, strict=True):
            setattr(row.stats, part.job, getattr(row.stats, part.job) + 1)

    def _apply(self, done: Sequence[tuple[Row, Part, Outcome]]) -> None:
        """Settle what is to be settled, commit what was clean, tell who watches, and open new windows."""
        commits = {row.place: self._settle(row, part, outcome) for row, part, outcome in done}
        if (cache := self.places.cache) is not None:
            cache.commit([commits.get(place, 0) for place in range(cache.first, cache.first + cache.active)])
        for row, part, outcome in done:
            # What the prompt's forward drafts beside its last token is no new speed yet, and is not told.
            filled, drafts = part.job == "prefill", outcome.drafts
            if row.record is not None and not (filled and (row.infill or not self.law.seeds)):
                self._guarded(row, self._tell, row, part.job, () if filled else drafts)
            if row.finished or row.error is not None or outcome.kept is None:
                continue
            row.drawn = outcome.law if drafts else row.drawn
            width = row.length - row.start + len(drafts) if drafts else self.scheme.width(row)
            self._guarded(row, row.open, width, drafts)
            # The order of a first window is drawn once more, with that of all others: so it has always been, and
            # seeds keep their texts.
            row.opened = not filled or bool(drafts)

    def _settle(self, row: Row, part: Part, outcome: Outcome) -> int:
        """How many slots of the row's part are committed."""
        row.before = row.length
        if part.job == "prefill":
            row.start += part.keep
        if outcome.kept is None or row.error is not None:
            return part.keep
        if part.job == "prefill":
            row.stats.free = int(row.limit > row.prompt)  # a prompt that is only scored yields none
        return part.keep + (self._guarded(row, row.settle, outcome.kept, outcome.bonus, outcome.clean) or 0)

    def _second_turn(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> None:
        """Draft the windows that were seen ahead."""
        taken = [i for i, (row, part) in enumerate(zip(rows, parts, strict=True))
                 if part.ahead and not row.finished and row.error is None]  # fmt: skip
        if not taken:
            return
        rows, parts = [rows[i] for i in taken], [parts[i] for i in taken]
        ahead = read.of(taken, [len(part.tokens) - part.ahead for part in parts])
        drafts = [part._replace(tokens=row.tokens[: part.ahead], job="draft")
                  for row, part in zip(rows, parts, strict=True)]  # fmt: skip
        outcomes = self.scheme.take(rows, drafts, ahead)
        # With the last of them a text may have ended.
        self._apply([(row, part, outcome) for row, part, outcome in zip(rows, parts, outcomes, strict=True)
                     if outcome.kept is not None and row.error is None])  # fmt: skip

    def _tell(self, row: Row, job: Kind, drafts: Sequence[int | None]) -> None:
        self._told.append((row, step_of(row, self.engine.stats.forwards, job, drafts)))

    @staticmethod
    def _guarded(row: Row, act: Callable[..., Any], *args: Any) -> Any:
        """What a function of the caller's raises is its row's own: the others go on."""
        try:
            return act(*args)
        except Exception as error:
            row.error = error


def _neighbours(rows: Sequence[Row]) -> list[Row]:
    """Those of the `rows` that are worth one forward: all, where they lie close together in the cache."""
    of = {row.place: row for row in rows}
    if 2 * len(of) > max(of) - min(of):
        return list(rows)
    first = min(rows, key=lambda row: row.index).place
    end = next(place for place in itertools.count(first) if place not in of)
    return [of[place] for place in range(first, end)]
