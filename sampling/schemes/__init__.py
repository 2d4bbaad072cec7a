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


class Answer(NamedTuple):
    """What a forward says of some rows.

    Attributes:
        logits: `[n, V]` of each row, of the slots that it wanted.
        read: gives more of them.
    """

    rows: Sequence[Row]
    parts: Sequence[Part]
    logits: Sequence[Tensor]
    read: Read

    @property
    def all(self) -> Tensor:
        """The logits of all rows, `[N, V]`."""
        return torch.cat(list(self.logits))


OPEN = Outcome()
Price = Callable[[int], float]
Guess = tuple[list[int], Tensor | None]  # tokens, and for rows that sample the laws [n, V] they were drawn from


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

    def round_cost(self, width: int, price: Price, guess: float) -> float:
        """What a round with a window of so many slots costs, from what forwards do by their slots and a `guess` of a
        draft head does."""
        return 2 * price(width)

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
        positions = [[row.length] if last else [] for row, last in zip(rows, done, strict=True)]
        return [Outcome(0, tokens[0]) if tokens else OPEN for tokens, _ in said(rows, positions, read(slots))]

    def next(self, row: Row) -> Part:
        return self.confirming(row)

    def confirming(self, row: Row) -> Part:
        """The row's window as clean text, and what asks for the token after each of it."""
        width = len(row.tokens)
        probes = [row.fill] * (width * self.law.probed)
        return Part([*row.tokens, *probes], shapes.said(self.law, width), "settle")

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        found = said(rows, [[row.length] for row in rows], read([self.law.says(1)] * len(rows)))
        return [Outcome(1, token, clean=True) for (token,), _ in found]


class Windows(Ar):
    """`block`, `diffusion` and `infill`.

    Attributes:
        acts: the methods that say what became of rows, in their order; `act` names the one of each row.
    """

    acts: tuple[str, ...] = ("settled", "drafted")

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

    def act(self, row: Row, part: Part) -> str:
        """By which method the row gets its outcome."""
        return "drafted" if part.job == "draft" else "settled"

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        wanted = [self.wanted(row, part) for row, part in zip(rows, parts, strict=True)]
        acts = [self.act(row, part) for row, part in zip(rows, parts, strict=True)]
        logits = read(wanted).split([len(slots) for slots in wanted])
        found = [OPEN] * len(rows)
        for name in self.acts:
            mine = [i for i, act in enumerate(acts) if act == name]
            if not mine:
                continue
            answer = Answer([rows[i] for i in mine], [parts[i] for i in mine], [logits[i] for i in mine], read.of(mine))
            for i, outcome in zip(mine, getattr(self, name)(answer), strict=True):
                found[i] = outcome
        return found

    def wanted(self, row: Row, part: Part) -> list[int]:
        """The slots of a row's part that somebody reads."""
        if part.job == "draft":
            answers = shapes.answers(self.law, len(row.tokens))
            return [answers[i] for i in self.slots(row, part)]
        return [len(row.tokens) - 1] if self.law.seeds and not row.infill else []

    def slots(self, row: Row, part: Part) -> list[int]:
        """What a draft may show."""
        hidden = [i for i in row.revealable if row.hidden[i]]
        if row.looks_back and row.plan.mode != "speculative":
            return hidden[:1]
        if (size := row.plan.sub_block_size) is None:
            return hidden
        begin = row.revealable.start
        return [i for i in hidden if (i - begin) // size == (hidden[0] - begin) // size]

    def settled(self, answer: Answer) -> list[Outcome]:
        """The whole window stands, and its last row says what follows."""
        rows = answer.rows
        if not (self.law.seeds and not rows[0].infill):
            return [Outcome(row.end - row.start, clean=True) for row in rows]
        seeds = said(rows, [[row.start + len(row.tokens)] for row in rows], answer.all)
        return [Outcome(len(row.tokens), seed, clean=True) for row, ((seed,), _) in zip(rows, seeds, strict=True)]

    def drafted(self, answer: Answer) -> list[Outcome]:
        """The rule shows some of what is hidden."""
        rows = answer.rows
        slots = [self.slots(row, part) for row, part in zip(rows, answer.parts, strict=True)]
        ends = [[row.start + slot for slot in own] for row, own in zip(rows, slots, strict=True)]
        final = [0] * len(rows) if rows[0].plan.mode == "speculative" else None  # those are verified later
        reveal(rows, slots, judged(rows, ends, answer.all, final))
        return [Outcome(row.end - row.start) if row.closed else OPEN for row in rows]


def score_prompts(rows: Sequence[Row], parts: Sequence[Part], read: Read) -> None:
    """Write down how likely each token of a piece of a prompt was, in the rows that keep a record of that."""
    for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
        count = min(part.keep, row.prompt - row.start - 1)
        if row.record is not None and row.record.wants_prompt and count > 0:
            # Row by row: logits of all prompts at once may take more memory than the model.
            positions = range(row.start + 1, row.start + 1 + count)
            row.record.enter(positions, [row.text[at] for at in positions], read.of([i])([range(count)]))


def said(
    rows: Sequence[Row], positions: Sequence[Sequence[int]], logits: Tensor, final: int | None = None
) -> list[Guess]:
    """Tokens for `positions` of each row's text, by logits `[N, V]` as its processors want them; written down in rows
    that keep a record. `final`: how many of each row's first stay, and are not only guessed; None: all."""
    law = judged(rows, positions, logits, None if final is None else [final] * len(rows))
    tokens, laws = choose(rows, [len(own) for own in positions], law)
    if any(row.record is not None for row in rows):
        parts = law.split([len(own) for own in tokens])
        for row, where, own, part in zip(rows, positions, tokens, parts, strict=True):
            if row.record is not None and own:
                row.record.note(where, own, part)
    return list(zip(tokens, laws, strict=True))
