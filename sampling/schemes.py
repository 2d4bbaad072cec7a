"""Schemes: how a mode spends its forwards, each in two short functions.

`next` says what a row puts into the next forward, and `take` what follows from it. A forward is read through `read`,
which computes logits only for the slots that are asked for; `take` leaves rows as they are, but for drafts revealed
in a window that stays open.

    Ar            the last token goes in, the next one comes out
    Windows       block, diffusion and infill: drafts until nothing is hidden, then a clean pass that commits
    Guided        the same over two canvases, one of which hides the prompt: classifier-free guidance
    Speculative   the last token goes in, the next one comes out with drafts behind it, and a clean pass keeps of them
                  what it would have said itself
    Linear        windows like those of block, and a clean pass that keeps what it would have said itself
    Fused         the same in one forward: behind the window stand its successors, one for each outcome
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hybrid import Layout
from hybrid.law import Law
from hybrid.sampling import shapes
from hybrid.sampling.accept import verify_fresh, verify_greedy, verify_sampled
from hybrid.sampling.choice import choose, judged, likeliest, named, processed
from hybrid.sampling.draft import reveal
from hybrid.sampling.row import Plan, Row
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
        drafts, law: the next window's, where they are known already, and what they were drawn from.
    """

    kept: int | None = None
    bonus: int | None = None
    clean: bool = False
    drafts: Sequence[int] = ()
    law: Tensor | None = None


Read = Callable[[Sequence[Sequence[int]]], Tensor]  # slots of each row's part -> logits [N, V], no mask token in them
OPEN = Outcome()


class Scheme(Protocol):
    """One way to decode, for any number of rows at once. Schemes know their law and no row."""

    def next(self, row: Row) -> Part:
        """What `row` puts into the next forward."""

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        """What follows for each row from the forward that its part was in."""


class Ar:
    """`mode="ar"`, and every scheme's prefill."""

    def __init__(self, law: Law, prefill: int | None = None) -> None:
        """`prefill`: tokens of a prompt in one forward at most; None: all."""
        self.law, self.chunk = law, prefill

    def width(self, row: Row) -> int:
        """Of the window that a row opens next."""
        return row.width()

    @staticmethod
    def spare(plan: Plan) -> int:
        """Slots of a cache that forwards may come to use behind the limit of a text, one for padding included."""
        return 1

    def prefill(self, row: Row) -> Part:
        """The next piece of what the cache lacks of a prompt."""
        end = row.target
        if self.chunk is not None:
            end = min(end, row.start + max(1, self.chunk // self.law.unit) * self.law.unit)
        tokens = row.text[row.start : end]
        return Part(tokens, shapes.clean(self.law, len(tokens)), "prefill", keep=len(tokens))

    def first(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        """The first token of each row whose prompt is in now, where the model gives one."""
        done = [row.seeded and row.start + part.keep == row.target for row, part in zip(rows, parts, strict=True)]
        if not any(done):
            return [OPEN] * len(rows)
        slots = [[part.keep - 1] if last else [] for part, last in zip(parts, done, strict=True)]
        logits = read(slots)
        logits = judged(rows, [[row.length] if last else [] for row, last in zip(rows, done, strict=True)], logits)
        tokens, _ = choose(rows, [len(s) for s in slots], logits)
        note(rows, [[row.length] for row in rows], tokens, logits)
        return [Outcome(0, token[0]) if token else OPEN for token in tokens]

    def next(self, row: Row) -> Part:
        return Part(row.tokens, shapes.clean(self.law, 1), "settle")

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        logits = judged(rows, [[row.length] for row in rows], read([[0]] * len(rows)))
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
            self.drafted([rows[i] for i in drafted], [logits[i] for i in drafted])
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

    def drafted(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> None:
        """Let the rule show some of what is hidden."""
        slots = [self.slots(row) for row in rows]
        ends = [[row.start + slot for slot in own] for row, own in zip(rows, slots, strict=True)]
        guesses = () if rows[0].plan.mode != "speculative" else ([0] * len(rows),)  # which are verified later
        reveal(rows, slots, judged(rows, ends, torch.cat(list(logits)), *guesses))


class Guided(Windows):
    """Classifier-free guidance for models whose canvas is all there is, as LLaDA's published code has it: beside the
    canvas stands another in which the prompt is hidden, and logits go on from what that one says, through what the
    canvas says, `guidance` times as far."""

    def next(self, row: Row) -> Part:
        part = super().next(row)
        blind = [row.fill] * row.prompt + row.tokens[row.prompt :]
        return part._replace(tokens=[*part.tokens, *blind], layout=shapes.twice(self.law, len(row.tokens)))

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        def guided(slots: Sequence[Sequence[int]]) -> Tensor:
            both = [[*own, *(len(row.tokens) + slot for slot in own)] for row, own in zip(rows, slots, strict=True)]
            found = []
            for row, logits in zip(rows, read(both).split([len(own) for own in both]), strict=True):
                seen, blind = logits.chunk(2)
                scale = 1.0 if row.plan.guidance is None else row.plan.guidance
                found.append(blind + scale * (seen - blind))
            return self.law.without_mask(torch.cat(found))

        return super().take(rows, parts, guided)


class Speculative(Windows):
    """`mode="speculative"`, with a free root (Uno, arXiv 2609.04010). A round is two forwards. In the first the seed is
    clean and committed, so that its row is the exact law of the next token, which needs no test; masks stand behind it,
    and all that they guess is verified in the second. A round gains that token, the drafts that are kept, and the one
    that the verification adds: two at least."""

    def width(self, row: Row) -> int:
        return 1

    def next(self, row: Row) -> Part:
        if len(row.tokens) > 1:
            return Part(row.tokens, shapes.clean(self.law, len(row.tokens)), "settle")
        masks = max(self.guesses(row), default=0)
        return Part([*row.tokens, *[row.fill] * masks], shapes.rooted(self.law, masks), "settle")

    def guesses(self, row: Row) -> list[int]:
        """The slots of a root that answer the drafts of the window behind it. A window of one has none."""
        return [1 + slot for slot in shapes.answers(self.law, row.width())[1:]]

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        roots = [len(row.tokens) == 1 for row in rows]
        wanted = [
            [0, *self.guesses(row)] if root else list(range(len(row.tokens)))
            for row, root in zip(rows, roots, strict=True)
        ]  # fmt: skip
        logits = read(wanted).split([len(slots) for slots in wanted])
        found = [OPEN] * len(rows)
        for these, act in ((False, self.verified), (True, self.rooted)):
            mine = [i for i, root in enumerate(roots) if root is these]
            if mine:
                for i, outcome in zip(mine, act([rows[i] for i in mine], [logits[i] for i in mine]), strict=True):
                    found[i] = outcome
        return found

    def rooted(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> list[Outcome]:
        """The next token, and drafts behind it."""
        ends = [[row.length + i for i in range(len(own))] for row, own in zip(rows, logits, strict=True)]
        counts, law = [len(own) for own in logits], judged(rows, ends, torch.cat(list(logits)), [1] * len(rows))
        tokens, laws = choose(rows, counts, law)
        note(rows, [range(row.length, row.length + n) for row, n in zip(rows, counts, strict=True)], tokens, law)
        return [
            Outcome(1, token, clean=True, drafts=drafts, law=None if own is None else own[1:])
            for (token, *drafts), own in zip(tokens, laws, strict=True)
        ]

    def verified(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> list[Outcome]:
        return verified(rows, logits, root=1)


class Linear(Windows):
    """Speculation whose windows, the seed noisy among them, are denoised in several drafts before they are verified:
    the linear speculation of Nemotron-Labs-Diffusion with its threshold (arXiv 2607.05722)."""

    def wanted(self, row: Row, part: Part) -> list[int]:
        return super().wanted(row, part) if part.job == "draft" else list(range(len(row.tokens)))

    def settled(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> list[Outcome]:
        return verified(rows, logits, root=0)

    def slots(self, row: Row) -> list[int]:
        if self.last(row):
            return [i for i, hidden in enumerate(row.hidden) if hidden]
        return super().slots(row)

    def last(self, row: Row) -> bool:
        """Whether this is the window's last draft."""
        return row.plan.drafts is not None and row.step + 1 >= row.plan.drafts

    def drafted(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> None:
        """Let the rule show some of what is hidden, and with the last draft show all."""
        last = [self.last(row) for row in rows]
        if not all(last):
            early = [i for i, is_last in enumerate(last) if not is_last]
            super().drafted([rows[i] for i in early], [logits[i] for i in early])
            late = [i for i, is_last in enumerate(last) if is_last]
            rows, logits = [rows[i] for i in late], [logits[i] for i in late]
        if not rows:
            return
        slots, counts = [self.slots(row) for row in rows], [len(own) for own in logits]
        ends = [[row.start + slot for slot in own] for row, own in zip(rows, slots, strict=True)]
        law = judged(rows, ends, torch.cat(list(logits)), [0] * len(rows))
        tokens, laws = choose(rows, counts, law)
        for row, own, new, law_of in zip(rows, slots, tokens, laws, strict=True):
            row.reveal([(slot, token, True) for slot, token in zip(own, new, strict=True)], {})
            row.drawn = law_of
        places = [[row.start + slot for slot in own] for row, own in zip(rows, slots, strict=True)]
        note(rows, places, tokens, law)


class Fused(Speculative):
    """Speculation with one forward a round (arXiv 2607.05722, quadratic mode; TiDAR, arXiv 2511.08923). It is a layout:
    the window's clean slots come first, so that a commit keeps a prefix of them, and behind them stand as many private
    streams of masks. Stream a is the next window in case a drafts are accepted: it begins behind the token that follows
    them, which is not known yet and so is a mask too."""

    def width(self, row: Row) -> int:
        return row.width()

    @staticmethod
    def spare(plan: Plan) -> int:
        return plan.block_size * (plan.block_size + 1)

    def prefill(self, row: Row) -> Part:
        part = super().prefill(row)
        # The prompt carries the first stream, if more than one token is to come.
        if row.start + part.keep < row.target or row.limit <= row.target + 1:
            return part
        following = row.width()
        layout = shapes.clean(self.law, part.keep).cat(shapes.window(self.law, following, part.keep))
        return part._replace(tokens=part.tokens + [row.fill] * following, layout=layout)

    def first(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        stream = [range(part.keep, len(part.tokens)) for part in parts]
        drafts = self.look_ahead(rows, stream, [row.length + 1 for row in rows], read)
        found = super().first(rows, parts, read)
        return [
            Outcome(o.kept, o.bonus, drafts=d, law=law) for o, (d, law) in zip(found, drafts, strict=True)
        ]

    def next(self, row: Row) -> Part:
        width, following = len(row.tokens), row.width()
        masks = [row.fill] * (width * following)
        return Part(row.tokens + masks, shapes.outcomes(self.law, width, following), "settle")

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        wanted = [list(range(len(row.tokens))) for row in rows]
        found = verified(rows, list(read(wanted).split([len(slots) for slots in wanted])), root=0)
        # Which stream comes true is known only now, and only its logits are computed.
        streams = []
        for row, part, outcome in zip(rows, parts, found, strict=True):
            width = len(row.tokens)
            following = (len(part.tokens) - width) // width
            assert outcome.kept is not None
            begin = width + (outcome.kept - 1) * following
            streams.append(range(begin, begin + following))
        begins = [row.start + 1 + (outcome.kept or 0) for row, outcome in zip(rows, found, strict=True)]
        drafts = self.look_ahead(rows, streams, begins, read)
        return [
            Outcome(o.kept, o.bonus, clean=True, drafts=d, law=law) for o, (d, law) in zip(found, drafts, strict=True)
        ]

    def look_ahead(
        self, rows: Sequence[Row], streams: Sequence[range], begins: Sequence[int], read: Read
    ) -> list[tuple[Sequence[int], Tensor | None]]:
        """Drafts of the next windows, from the slots of their streams; slot 0 stands for what is not known. The drafts
        stand in the text from `begins` on."""
        wanted = [[own[i] for i in shapes.answers(self.law, len(own))[1:]] if own else [] for own in streams]
        if not any(wanted):
            return [((), None)] * len(rows)
        counts = [len(slots) for slots in wanted]
        ends = [[begin + i for i in range(n)] for begin, n in zip(begins, counts, strict=True)]
        law = judged(rows, ends, read(wanted), [0] * len(rows))
        tokens, laws = choose(rows, counts, law)
        note(rows, [[begin + i for i in range(n)] for begin, n in zip(begins, counts, strict=True)], tokens, law)
        return list(zip(tokens, laws, strict=True))


def verified(rows: Sequence[Row], logits: Sequence[Tensor], root: int) -> list[Outcome]:
    """What the clean pass over each window would have said itself; `root`: tokens that the round has gained before.
    """
    # A processor of the caller's may keep a state: it is asked for one slot after the other, as far as drafts are kept.
    stateful = [len(row.guessing or ()) < len(row.processors or ()) for row in rows]
    ends = [[row.start + 1 + i for i in range(len(row.tokens))] for row in rows]
    counts = [len(row.tokens) for row in rows]
    law = judged(rows, ends, torch.cat(list(logits)), [0 if s else n for s, n in zip(stateful, counts, strict=True)])
    parts, want = law.split(counts), likeliest(law).tolist()
    found, at = [], 0
    for row, own, raw, asked, places in zip(rows, parts, logits, stateful, ends, strict=True):
        draft, best = row.tokens[1:], want[at : at + len(own)]
        at += len(own)
        uniform = [] if row.plan.warp is None else row.uniform(len(own))
        if asked:
            own, best = _one_by_one(row, raw, uniform, places)
        n, bonus = _kept(row, draft, own, best, uniform)
        # What stands behind the first draft that is not kept was never asked for.
        ((bonus,),) = named([row], [1], torch.tensor([bonus]), own[n : n + 1])
        row.stats.accepted.append(root + n + 1)
        if row.window is not None:
            row.window.saw(len(row.tokens), n + 1)
        if row.record is not None:
            row.record.note([row.start + 1 + i for i in range(n + 1)], [*draft[:n], bonus], own[: n + 1])
        found.append(Outcome(n + 1, bonus, clean=True))
    return found


def _kept(
    row: Row, draft: Sequence[int], law: Tensor, best: Sequence[int], uniform: Sequence[float]
) -> tuple[int, int]:
    """How many drafts are kept, and the token behind them; -1 where none follows from `law` `[K, V]`."""
    if row.plan.warp is None:
        return verify_greedy(draft, best)
    p = row.plan.warp.law(law)
    if row.plan.drafts != 1:
        n, bonus = verify_fresh(draft, p, uniform)
    else:
        assert row.drawn is not None, "rejection needs the laws that the drafts were drawn from"
        n, bonus = verify_sampled(draft, row.drawn[: len(draft)], p, uniform)
    return n, bonus if bonus < law.shape[-1] else -1  # a law that is none has no token at any quantile


def _one_by_one(row: Row, logits: Tensor, uniform: Sequence[float], places: Sequence[int]) -> tuple[Tensor, list[int]]:
    """A window's logits as the row's processors want them, up to the first draft that is not kept."""
    law, best = logits.clone(), [0] * len(logits)
    for i, end in enumerate(places):
        if end >= row.limit or (i and row.tokens[i] in row.plan.eos):  # where the text ends
            break
        law[i] = row.law.without_mask(processed(row, row.processors, end, logits[i : i + 1]))[0]
        best[i] = int(likeliest(law[i : i + 1]))
        draft = row.tokens[1 : i + 2]
        if len(draft) == i + 1 and _kept(row, draft, law[: i + 2], best[: i + 2], uniform[: i + 2])[0] <= i:
            break
    return law, best


def note(rows: Sequence[Row], places: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], logits: Tensor) -> None:
    """Write down tokens that were revealed by logits `[N, V]`, in the rows that keep a record."""
    if any(row.record is not None for row in rows):
        parts = logits.split([len(own) for own in tokens])
        for row, where, own, law in zip(rows, places, tokens, parts, strict=True):
            if row.record is not None and own:
                row.record.note(where, own, law)
