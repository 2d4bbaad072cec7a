"""Schemes: how a mode spends its forwards, each in two short functions.

`next` says what a row puts into the next forward, and `take` what follows from it. A forward is read through `read`,
which computes logits only for the slots that are asked for; `take` leaves rows as they are, but for drafts revealed
in a window that stays open.

    Ar        the last token goes in, the next one comes out
    Windows   block, diffusion and infill: drafts until nothing is hidden, then a clean pass that commits

Others stand in files of their own: speculation.py, approximate.py, guided.py, in_flight.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hybrid import Layout
from hybrid.law import Law
from hybrid.sampling.choosing.choice import choose, judged
from hybrid.sampling.choosing.draft import reveal
from hybrid.sampling.engine import Read
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.schemes import shapes
from hybrid.sampling.stats import Kind


class Part(NamedTuple):
    """What one row puts into a forward.

    Attributes:
        layout: `[4, 1, T]` for a text that begins at 0; it is moved to where the row's window begins.
        job: under which the row counts the forward.
        ahead: so many of its last slots are the next window's, a draft that is read when this one has been settled.
        keep: tokens of it to commit whatever comes out.
        rewind: forget first what the cache holds.
    """

    tokens: list[int]
    layout: Layout
    job: Kind
    ahead: int = 0
    keep: int = 0
    rewind: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Attributes:
        kept: tokens of its window that are text now; None: the window stays open.
        bonus: the token that follows them.
        clean: they were clean in this forward, and are committed.
        drafts, law: the next window's, where they are known already (None: hidden), and what they were drawn from.
    """

    kept: int | None = None
    bonus: int | None = None
    clean: bool = False
    drafts: Sequence[int | None] = ()
    law: Tensor | None = None


OPEN = Outcome()
Price = Callable[[int], float]


class Scheme(Protocol):
    """One way to decode, for any number of rows at once. Schemes know their law and no row."""

    def next(self, row: Row) -> Part:
        """What `row` puts into the next forward."""

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        """What follows for each row from the forward that its part was in."""


class Ar:
    """`mode="ar"`, and every scheme's prefill.

    Attributes:
        free: tokens of a speculative round that are exact before it is verified.
        least: slots of a window that chooses its width, at least.
    """

    free, least = 0, 2

    def __init__(self, law: Law, prefill: int | None = None) -> None:
        """`prefill`: tokens of a prompt in one forward at most; None: all."""
        self.law, self.chunk = law, prefill

    def width(self, row: Row) -> int:
        """Of the window that a row opens next."""
        return row.width()

    @staticmethod
    def spare(plan: Plan) -> int:
        """Slots of a cache that forwards may come to use behind the limit of a text, one for padding included."""
        return 1 + plan.law.probed

    def round_costs(self, widest: int, price: Price, guess: float) -> list[float]:
        """What rounds with windows of 1, 2, ... slots cost, from what forwards do by their slots and a `guess` of a
        draft head does."""
        return [2 * price(width) for width in range(1, widest + 1)]

    def prefill(self, row: Row) -> Part:
        """The next piece of what the cache lacks of a prompt."""
        end = row.target
        if self.chunk is not None:
            end = min(end, row.start + max(1, self.chunk // self.law.unit) * self.law.unit)
        tokens = row.text[row.start : end]
        part = Part(tokens, shapes.clean(self.law, len(tokens)), "prefill", keep=len(tokens))
        if not (self.law.probed and end == row.target):
            return part
        last = shapes.said(self.law, 1).moved(torch.tensor([len(tokens) - 1]))
        return part._replace(tokens=[*tokens, row.fill], layout=part.layout.cat(Layout(last.labels[..., 1:])))

    def first(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        """The first token of each row whose prompt is in now, where the model gives one."""
        score_prompts(rows, parts, read)
        done = [row.seeded and row.start + part.keep == row.target for row, part in zip(rows, parts, strict=True)]
        if not any(done):
            return [OPEN] * len(rows)
        slots = [[part.keep - 1 + self.law.probed] if last else [] for part, last in zip(parts, done, strict=True)]
        logits = read(slots)
        logits = judged(rows, [[row.length] if last else [] for row, last in zip(rows, done, strict=True)], logits)
        tokens, _ = choose(rows, [len(s) for s in slots], logits)
        note(rows, [[row.length] for row in rows], tokens, logits)
        return [Outcome(0, token[0]) if token else OPEN for token in tokens]

    def next(self, row: Row) -> Part:
        return self.confirming(row)

    def confirming(self, row: Row) -> Part:
        """The row's window as clean text, and what asks for the token after each of it."""
        width = len(row.tokens)
        probes = [row.fill] * (width * self.law.probed)
        return Part([*row.tokens, *probes], shapes.said(self.law, width), "settle")

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        logits = judged(rows, [[row.length] for row in rows], read([self.law.says(1)] * len(rows)))
        tokens, _ = choose(rows, [1] * len(rows), logits)
        note(rows, [[row.length] for row in rows], tokens, logits)
        return [Outcome(1, token, clean=True) for (token,) in tokens]


class Windows(Ar):
    """`block`, `diffusion` and `infill`."""

    @staticmethod
    def spare(plan: Plan) -> int:
        return 1 if plan.to_limit else 2 * plan.block_size

    def next(self, row: Row) -> Part:
        width = len(row.tokens)
        if row.drafting:
            return Part(row.tokens, shapes.window(self.law, width), "draft")
        if self.law.grid and not self.law.seeds and row.plan.mode == "block":
            # What is settled is known already, so the next block is drafted beside it.
            tokens = [*row.tokens, *[row.fill] * width]
            return Part(tokens, shapes.clean_and_next(self.law, width), "settle", ahead=width)
        return Part(row.tokens, shapes.clean(self.law, width), "settle")

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        wanted = [self.wanted(row, part) for row, part in zip(rows, parts, strict=True)]
        logits = list(read(wanted).split([len(slots) for slots in wanted]))
        found = [OPEN] * len(rows)
        settled = [i for i, part in enumerate(parts) if part.job == "settle"]
        if settled:
            outcomes = self.settled([rows[i] for i in settled], [logits[i] for i in settled])
            for i, outcome in zip(settled, outcomes, strict=True):
                found[i] = outcome
        drafted = [i for i, part in enumerate(parts) if part.job == "draft"]
        if drafted:
            self.drafted([rows[i] for i in drafted], [logits[i] for i in drafted], read.of(drafted))
        for i in drafted:
            if rows[i].closed:
                found[i] = Outcome(rows[i].end - rows[i].start)
        return found

    def wanted(self, row: Row, part: Part) -> list[int]:
        """The slots of a row's part that somebody reads."""
        if part.job == "draft":
            answers = shapes.answers(self.law, len(row.tokens))
            return [answers[i] for i in self.slots(row)]
        return [len(row.tokens) - 1] if self.law.seeds and not row.infill else []

    def slots(self, row: Row) -> list[int]:
        """What the next draft may show."""
        hidden = [i for i in row.revealable if row.hidden[i]]
        if row.looks_back and row.plan.mode != "speculative":
            return hidden[:1]
        if (size := row.plan.sub_block_size) is None:
            return hidden
        begin = row.revealable.start
        return [i for i in hidden if (i - begin) // size == (hidden[0] - begin) // size]

    def settled(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> list[Outcome]:
        """The whole window stands, and its last row says what follows."""
        width = [len(row.tokens) for row in rows]
        if not (self.law.seeds and not rows[0].infill):
            return [Outcome(row.end - row.start, clean=True) for row in rows]
        ends = [[row.start + w] for row, w in zip(rows, width, strict=True)]
        law = judged(rows, ends, torch.cat(list(logits)))
        tokens, _ = choose(rows, [1] * len(rows), law)
        note(rows, ends, tokens, law)
        return [Outcome(w, token, clean=True) for w, (token,) in zip(width, tokens, strict=True)]

    def drafted(self, rows: Sequence[Row], logits: Sequence[Tensor], read: Read) -> None:
        """Let the rule show some of what is hidden."""
        slots = [self.slots(row) for row in rows]
        ends = [[row.start + slot for slot in own] for row, own in zip(rows, slots, strict=True)]
        guesses = () if rows[0].plan.mode != "speculative" else ([0] * len(rows),)  # which are verified later
        reveal(rows, slots, judged(rows, ends, torch.cat(list(logits)), *guesses))


def score_prompts(rows: Sequence[Row], parts: Sequence[Part], read: Read) -> None:
    """Write down how likely each token of a piece of a prompt was, in the rows that keep a record of that."""
    for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
        count = min(part.keep, row.prompt - row.start - 1)
        if row.record is not None and row.record.wants_prompt and count > 0:
            # Row by row: logits of all prompts at once may take more memory than the model.
            places = range(row.start + 1, row.start + 1 + count)
            row.record.enter(places, [row.text[place] for place in places], read.of([i])([range(count)]))


def note(
    rows: Sequence[Row], positions: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], logits: Tensor
) -> None:
    """Write down tokens that were revealed by logits `[N, V]`, in the rows that keep a record."""
    if any(row.record is not None for row in rows):
        parts = logits.split([len(own) for own in tokens])
        for row, where, own, law in zip(rows, positions, tokens, parts, strict=True):
            if row.record is not None and own:
                row.record.note(where, own, law)
