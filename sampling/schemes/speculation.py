"""Speculation: windows that are drafted at once, and kept as far as left to right would have said the same.

    Speculative   the last token goes in, the next one comes out with drafts behind it, and a clean pass keeps of them
                  what it would have said itself
    Ahead         the clean pass alone: what it kept last says by a draft head what may follow
    Linear        windows like those of block, and a clean pass that keeps what it would have said itself
    Fused         the same in one forward: behind the window stand its successors, one for each outcome
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybrid.sampling.choosing.accept import verify_fresh, verify_greedy, verify_sampled
from hybrid.sampling.choosing.choice import choose, judged, likeliest, named, processed
from hybrid.sampling.engine import Read
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.schemes import OPEN, Outcome, Part, Price, Windows, note, shapes

Guess = tuple[Sequence[int], Tensor | None]  # tokens, and for rows that sample the laws [n, V] they were drawn from


class Speculative(Windows):
    """`mode="speculative"`, with a free root (Uno, arXiv 2609.04010). A round is two forwards. In the first the seed is
    clean and committed, so that its row is the exact law of the next token, which needs no test; masks stand behind it,
    and all that they guess is verified in the second. A round gains that token, the drafts that are kept, and the one
    that the verification adds: two at least."""

    free, least = 1, 1

    def width(self, row: Row) -> int:
        return 1

    def round_costs(self, widest: int, price: Price, guess: float) -> list[float]:
        probed, found = self.law.probed, [price(1 + self.law.probed)]
        for width in range(2, widest + 1):
            root = 2 + probed + shapes.answers(self.law, width)[-1]
            found.append(price(root) + price(width * (1 + probed)))
        return found

    def next(self, row: Row) -> Part:
        if len(row.tokens) > 1:
            return self.confirming(row)
        masks = max(self.guesses(row), default=self.law.probed) - self.law.probed
        tokens = [*self.confirming(row).tokens, *[row.fill] * masks]
        return Part(tokens, shapes.rooted(self.law, masks), "settle")

    def guesses(self, row: Row) -> list[int]:
        """The slots of a root that answer the drafts of the window behind it. A window of one has none."""
        return [1 + self.law.probed + slot for slot in shapes.answers(self.law, row.width())[1:]]

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        roots = [len(row.tokens) == 1 for row in rows]
        wanted = [
            [*self.law.says(len(row.tokens)), *(self.guesses(row) if root else [])]
            for row, root in zip(rows, roots, strict=True)
        ]  # fmt: skip
        logits = read(wanted).split([len(slots) for slots in wanted])
        found = [OPEN] * len(rows)
        for these, act in ((False, self.verified), (True, self.rooted)):
            mine = [i for i, root in enumerate(roots) if root is these]
            if mine:
                outcomes = act([rows[i] for i in mine], [logits[i] for i in mine], read.of(mine))
                for i, outcome in zip(mine, outcomes, strict=True):
                    found[i] = outcome
        return found

    def rooted(self, rows: Sequence[Row], logits: Sequence[Tensor], read: Read) -> list[Outcome]:
        """The next token, and drafts behind it."""
        places = [range(row.length, row.length + len(own)) for row, own in zip(rows, logits, strict=True)]
        found = _chosen(rows, places, torch.cat(list(logits)), final=1)
        roots = [tokens[0] for tokens, _ in found]
        drafts: list[Guess] = [(tokens[1:], None if law is None else law[1:]) for tokens, law in found]
        for row, (own, _) in zip(rows, drafts, strict=True):
            if row.window is not None and not own:
                row.window.rest()
        return [
            Outcome(1, root, clean=True, drafts=tokens, law=law)
            for root, (tokens, law) in zip(roots, drafts, strict=True)
        ]

    def verified(self, rows: Sequence[Row], logits: Sequence[Tensor], read: Read) -> list[Outcome]:
        return verified(rows, logits, root=1)


class Ahead(Speculative):
    """Speculation where there is a draft head: the row that says the next token says by that head what may follow it.
    Drafts take no forward of their own then, so a round is one forward, and a text whose drafts are worth nothing gets
    none and is decoded as in `mode="ar"`."""

    free, least = 0, 1

    def round_costs(self, widest: int, price: Price, guess: float) -> list[float]:
        each = 1 + self.law.probed
        return [price(each * width) + guess * (width - 1) for width in range(1, widest + 1)]

    def first(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        found = super().first(rows, parts, read)
        said = [part.keep - 1 + self.law.probed for part in parts]
        return self.guessed(rows, found, said, [row.length for row in rows], read)

    def next(self, row: Row) -> Part:
        return self.confirming(row)

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        wanted = [self.law.says(len(row.tokens)) for row in rows]
        found = verified(rows, read(wanted).split([len(slots) for slots in wanted]), root=0)
        kept = [outcome.kept or 0 for outcome in found]
        said = [slots[n - 1] for slots, n in zip(wanted, kept, strict=True)]
        return self.guessed(rows, found, said, [row.start + n for row, n in zip(rows, kept, strict=True)], read)

    def guessed(
        self, rows: Sequence[Row], outcomes: list[Outcome], said: Sequence[int], places: Sequence[int], read: Read
    ) -> list[Outcome]:
        """The outcomes with drafts behind their bonus tokens, which slots `said` gave for `places` of the text."""
        counts = [
            0 if o.bonus is None or o.bonus in row.plan.eos or place + 1 >= row.limit else row.width() - 1
            for row, o, place in zip(rows, outcomes, places, strict=True)
        ]
        for row, outcome, count in zip(rows, outcomes, counts, strict=True):
            if row.window is not None and outcome.bonus is not None and not count:
                row.window.rest()
        busy = [i for i, count in enumerate(counts) if count]
        if not busy:
            return outcomes
        drafts = guessed_ahead(
            [rows[i] for i in busy], [outcomes[i].bonus or 0 for i in busy], [counts[i] for i in busy],
            [places[i] + 1 for i in busy], read.of(busy), [said[i] for i in busy],
        )  # fmt: skip
        for i, (tokens, law) in zip(busy, drafts, strict=True):
            outcomes[i] = replace(outcomes[i], drafts=tokens, law=law)
        return outcomes


class Linear(Windows):
    """Speculation whose windows, the seed noisy among them, are denoised in several drafts before they are verified:
    the linear speculation of Nemotron-Labs-Diffusion with its threshold (arXiv 2607.05722)."""

    def next(self, row: Row) -> Part:
        return super().next(row) if row.drafting else self.confirming(row)

    def wanted(self, row: Row, part: Part) -> list[int]:
        if part.job == "settle":
            return list(self.law.says(len(row.tokens)))
        return [] if self.last(row) else super().wanted(row, part)

    def settled(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> list[Outcome]:
        return verified(rows, logits, root=0)

    def last(self, row: Row) -> bool:
        """Whether this is the window's last draft."""
        return row.plan.drafts is not None and row.step + 1 >= row.plan.drafts

    def drafted(self, rows: Sequence[Row], logits: Sequence[Tensor], read: Read) -> None:
        """Let the rule show some of what is hidden, and with the last draft show all."""
        last = [self.last(row) for row in rows]
        early, late = ([i for i, is_last in enumerate(last) if is_last is kind] for kind in (False, True))
        if early:
            super().drafted([rows[i] for i in early], [logits[i] for i in early], read.of(early))
        if not late:
            return
        rows, read = [rows[i] for i in late], read.of(late)
        slots = [[i for i, hidden in enumerate(row.hidden) if hidden] for row in rows]
        answers = [shapes.answers(self.law, len(row.tokens)) for row in rows]
        asked = [[of[slot] for slot in own] for of, own in zip(answers, slots, strict=True)]
        places = [[row.start + slot for slot in own] for row, own in zip(rows, slots, strict=True)]
        drafts = _chosen(rows, places, read(asked))
        for row, own, (tokens, law) in zip(rows, slots, drafts, strict=True):
            row.reveal([(slot, token, True) for slot, token in zip(own, tokens, strict=True)], {})
            row.step, row.drawn = row.step + 1, law


class Fused(Speculative):
    """Speculation with one forward a round (arXiv 2607.05722, quadratic mode; TiDAR, arXiv 2511.08923). It is a layout:
    the window's clean slots come first, so that a commit keeps a prefix of them, and behind them stand as many private
    streams of masks. Stream a is the next window in case a drafts are accepted: it begins behind the token that follows
    them, which is not known yet and so is a mask too."""

    free, least = 0, 2

    def width(self, row: Row) -> int:
        return row.width()

    @staticmethod
    def spare(plan: Plan) -> int:
        return plan.block_size * (plan.block_size + 1 + plan.law.probed)

    def round_costs(self, widest: int, price: Price, guess: float) -> list[float]:
        each = 1 + self.law.probed
        return [price(width * (each + width)) for width in range(1, widest + 1)]

    def prefill(self, row: Row) -> Part:
        part = super().prefill(row)
        # The prompt carries the first stream, if more than one token is to come.
        if row.start + part.keep < row.target or row.limit <= row.target + 1:
            return part
        following = row.width()
        layout = part.layout.cat(shapes.window(self.law, following, part.keep))
        return part._replace(tokens=part.tokens + [row.fill] * following, layout=layout)

    def first(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        found = super().first(rows, parts, read)
        stream = [range(part.keep + self.law.probed, len(part.tokens)) for part in parts]
        drafts = self.look_ahead(rows, stream, [row.length + 1 for row in rows], found, read)
        return [
            Outcome(o.kept, o.bonus, drafts=d, law=law) for o, (d, law) in zip(found, drafts, strict=True)
        ]

    def next(self, row: Row) -> Part:
        width, following = len(row.tokens), row.width()
        masks = [row.fill] * (width * following)
        return Part(self.confirming(row).tokens + masks, shapes.outcomes(self.law, width, following), "settle")

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        wanted = [self.law.says(len(row.tokens)) for row in rows]
        found = verified(rows, list(read(wanted).split([len(slots) for slots in wanted])), root=0)
        # Which stream comes true is known only now, and only its logits are computed.
        streams = []
        for row, part, outcome in zip(rows, parts, found, strict=True):
            width, clean = len(row.tokens), len(row.tokens) * (1 + self.law.probed)
            following = (len(part.tokens) - clean) // width
            assert outcome.kept is not None
            begin = clean + (outcome.kept - 1) * following
            streams.append(range(begin, begin + following))
        begins = [row.start + 1 + (outcome.kept or 0) for row, outcome in zip(rows, found, strict=True)]
        drafts = self.look_ahead(rows, streams, begins, found, read)
        return [
            Outcome(o.kept, o.bonus, clean=True, drafts=d, law=law) for o, (d, law) in zip(found, drafts, strict=True)
        ]

    def look_ahead(
        self, rows: Sequence[Row], streams: Sequence[range], begins: Sequence[int], outcomes: Sequence[Outcome],
        read: Read,
    ) -> list[Guess]:  # fmt: skip
        """Drafts of the next windows, from the slots of their streams; slot 0 stands for the bonus token, which was not
        known. The drafts stand in the text from `begins` on."""
        wanted = [[own[i] for i in shapes.answers(self.law, len(own))[1:]] if own else [] for own in streams]
        if not any(wanted):
            return [((), None)] * len(rows)
        places = [range(begin, begin + len(own)) for begin, own in zip(begins, wanted, strict=True)]
        return _chosen(rows, places, read(wanted))


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


def guessed_ahead(
    rows: Sequence[Row], tokens: Sequence[int], counts: Sequence[int], begins: Sequence[int], read: Read,
    said: Sequence[int],
) -> list[Guess]:  # fmt: skip
    """So many drafts behind these `tokens` of some rows, one after another: each is read off the slot that `said` the
    token, and off what was drafted before it.

    Args:
        begins: places of the text where the drafts begin.
    """
    reader, now = read.ahead(said), torch.tensor(tokens, device=read.hidden.device)
    if not any(row.plan.warp or row.guessing or row.record for row in rows):
        read.engine.stats.logits += sum(counts)
        return [(own[:n], None) for own, n in zip(reader.likeliest(now, max(counts)), counts, strict=True)]
    found: list[list[int]] = [[] for _ in rows]
    laws: list[list[Tensor]] = [[] for _ in rows]
    state = None
    for i in range(max(counts)):
        logits, state = reader(now, state)
        busy = [j for j, count in enumerate(counts) if i < count]
        places = [[begins[j] + i] for j in busy]
        for j, (own, law) in zip(busy, _chosen([rows[j] for j in busy], places, read.words(logits[busy])), strict=True):
            found[j] += own
            laws[j] += [] if law is None else [law]
        now = torch.tensor([own[-1] for own in found], device=now.device)
    return [(own, torch.cat(law) if law else None) for own, law in zip(found, laws, strict=True)]


def _chosen(
    rows: Sequence[Row], places: Sequence[Sequence[int]], logits: Tensor, final: int = 0
) -> list[Guess]:  # fmt: skip
    """`final`: how many of each row's first stay, and are not only guessed."""
    law = judged(rows, places, logits, [final] * len(rows))
    tokens, laws = choose(rows, [len(own) for own in places], law)
    note(rows, places, tokens, law)
    return list(zip(tokens, laws, strict=True))
