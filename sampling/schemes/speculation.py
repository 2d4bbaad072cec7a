"""Speculation: windows that are drafted at once, and kept as far as left to right would have said the same.

    Speculative   the last token goes in, the next one comes out with drafts behind it, and a clean pass keeps of them
                  what it would have said itself
    Ahead         the clean pass alone: what it kept last says by a draft head what may follow
    Fused         the clean pass alone: behind the window stand its successors, one for each outcome
    Linear        windows like those of block, and a clean pass that keeps what it would have said itself
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid.sampling.choosing.accept import verify_fresh, verify_greedy, verify_sampled
from hybrid.sampling.choosing.choice import judged, likeliest, named, processed
from hybrid.sampling.engine import Read
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.schemes import OPEN, Answer, Guess, Outcome, Part, Price, Windows, said, shapes


class Speculative(Windows):
    """`mode="speculative"`, with a free root (Uno, arXiv 2609.04010). A round is two forwards. In the first the seed is
    clean and committed, so that its row is the exact law of the next token, which needs no test; masks stand behind it,
    and all that they guess is verified in the second. A round gains that token, the drafts that are kept, and the one
    that the verification adds: two at least."""

    free, least = 1, 1

    def width(self, row: Row) -> int:
        return 1

    def round_cost(self, width: int, price: Price, guess: float) -> float:
        probed = self.law.probed
        if width == 1:
            return price(1 + probed)
        return price(2 + probed + shapes.answers(self.law, width)[-1]) + price(width * (1 + probed))

    def next(self, row: Row) -> Part:
        if len(row.tokens) > 1:
            return self.confirming(row)
        masks = max(self.guesses(row), default=self.law.probed) - self.law.probed
        tokens = [*self.confirming(row).tokens, *[row.fill] * masks]
        return Part(tokens, shapes.rooted(self.law, masks), "settle")

    def guesses(self, row: Row) -> list[int]:
        """The slots of a root that answer the drafts of the window behind it. A window of one has none."""
        return [1 + self.law.probed + slot for slot in shapes.answers(self.law, row.width())[1:]]

    def act(self, row: Row, part: Part) -> str:
        return "drafted" if len(row.tokens) == 1 else "settled"

    def wanted(self, row: Row, part: Part) -> list[int]:
        guesses = self.guesses(row) if len(row.tokens) == 1 else []
        return [*self.law.says(len(row.tokens)), *guesses]

    def settled(self, answer: Answer) -> list[Outcome]:
        """What the verification keeps."""
        return verified(answer, root=1)

    def drafted(self, answer: Answer) -> list[Outcome]:
        """The next token, and drafts behind it."""
        rows, found = answer.rows, []
        positions = [range(row.length, row.length + len(own)) for row, own in zip(rows, answer.logits, strict=True)]
        for row, (tokens, law) in zip(rows, said(rows, positions, answer.all, final=1), strict=True):
            root, *drafts = tokens
            if row.window is not None and not drafts:
                row.window.rest()
            found.append(Outcome(1, root, clean=True, drafts=drafts, law=None if law is None else law[1:]))
        return found


class OneForward(Speculative, ABC):
    """Speculation whose rounds are a forward each: it verifies a window, and what comes out of it drafts the next."""

    free = 0

    def first(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        return self.ahead(Answer(rows, parts, (), read), super().first(rows, parts, read))

    def act(self, row: Row, part: Part) -> str:
        return "settled"

    def wanted(self, row: Row, part: Part) -> list[int]:
        return list(self.law.says(len(row.tokens)))

    def settled(self, answer: Answer) -> list[Outcome]:
        """What the verification keeps, and drafts behind it."""
        return self.ahead(answer, verified(answer, root=0))

    @abstractmethod
    def ahead(self, answer: Answer, outcomes: list[Outcome]) -> list[Outcome]:
        """The outcomes with drafts behind their bonus tokens."""

    @staticmethod
    def behind(row: Row, outcome: Outcome) -> int:
        """The position behind the bonus token. Before a row has a window, that is the first token of all."""
        return 1 + (row.start + (outcome.kept or 0) if outcome.clean else row.length)


class Ahead(OneForward):
    """Speculation where there is a draft head: the row that says the next token says by that head what may follow it.
    Drafts take no forward of their own then, so a round is one forward, and a text whose drafts are worth nothing gets
    none and is decoded as in `mode="ar"`."""

    def round_cost(self, width: int, price: Price, guess: float) -> float:
        return price(width * (1 + self.law.probed)) + guess * (width - 1)

    def next(self, row: Row) -> Part:
        return self.confirming(row)

    def ahead(self, answer: Answer, outcomes: list[Outcome]) -> list[Outcome]:
        rows, parts = answer.rows, answer.parts
        begins = [self.behind(row, outcome) for row, outcome in zip(rows, outcomes, strict=True)]
        counts = [
            0 if o.bonus is None or o.bonus in row.plan.eos or begin >= row.limit else row.width() - 1
            for row, o, begin in zip(rows, outcomes, begins, strict=True)
        ]
        for row, outcome, count in zip(rows, outcomes, counts, strict=True):
            if row.window is not None and outcome.bonus is not None and not count:
                row.window.rest()
        busy = [i for i, count in enumerate(counts) if count]
        if not busy:
            return outcomes
        said_by = [self.says(rows[i], parts[i], outcomes[i]) for i in busy]
        drafts = guessed_ahead(
            [rows[i] for i in busy], [outcomes[i].bonus or 0 for i in busy], [counts[i] for i in busy],
            [begins[i] for i in busy], answer.read.of(busy), said_by,
        )  # fmt: skip
        for i, (tokens, law) in zip(busy, drafts, strict=True):
            outcomes[i] = Outcome(outcomes[i].kept, outcomes[i].bonus, outcomes[i].clean, tokens, law)
        return outcomes

    def says(self, row: Row, part: Part, outcome: Outcome) -> int:
        """The slot of the part that said the bonus token."""
        if not outcome.clean:
            return part.keep - 1 + self.law.probed
        return self.law.says(len(row.tokens))[(outcome.kept or 0) - 1]


class Fused(OneForward):
    """Speculation with one forward a round (arXiv 2607.05722, quadratic mode; TiDAR, arXiv 2511.08923). It is a layout:
    the window's clean slots come first, so that a commit keeps a prefix of them, and behind them stand as many private
    streams of masks. Stream a is the next window in case a drafts are accepted: it begins behind the token that follows
    them, which is not known yet and so is a mask too."""

    least = 2

    def width(self, row: Row) -> int:
        return row.width()

    @staticmethod
    def spare(plan: Plan) -> int:
        return plan.block_size * (plan.block_size + 1 + plan.law.probed)

    def round_cost(self, width: int, price: Price, guess: float) -> float:
        return price(width * (1 + self.law.probed + width))

    def prefill(self, row: Row) -> Part:
        part = super().prefill(row)
        # The prompt carries the first stream, if more than one token is to come.
        if row.start + part.keep < row.target or row.limit <= row.target + 1:
            return part
        following = row.width()
        layout = part.layout.cat(shapes.window(self.law, following, part.keep))
        return part._replace(tokens=part.tokens + [row.fill] * following, layout=layout)

    def next(self, row: Row) -> Part:
        width, following = len(row.tokens), row.width()
        masks = [row.fill] * (width * following)
        return Part(self.confirming(row).tokens + masks, shapes.outcomes(self.law, width, following), "settle")

    def ahead(self, answer: Answer, outcomes: list[Outcome]) -> list[Outcome]:
        # Which stream comes true is known only now, and only its logits are computed.
        streams = [self.stream(*each) for each in zip(answer.rows, answer.parts, outcomes, strict=True)]
        # Slot 0 stands for the bonus token, which was not known.
        wanted = [[own[i] for i in shapes.answers(self.law, len(own))[1:]] if own else [] for own in streams]
        if not any(wanted):
            return outcomes
        begins = [self.behind(row, outcome) for row, outcome in zip(answer.rows, outcomes, strict=True)]
        positions = [range(begin, begin + len(own)) for begin, own in zip(begins, wanted, strict=True)]
        drafts = said(answer.rows, positions, answer.read(wanted), final=0)
        return [
            Outcome(o.kept, o.bonus, o.clean, tokens, law) for o, (tokens, law) in zip(outcomes, drafts, strict=True)
        ]

    def stream(self, row: Row, part: Part, outcome: Outcome) -> range:
        """The slots of the part in which the window was drafted that follows on this outcome."""
        if not outcome.clean:
            return range(part.keep + self.law.probed, len(part.tokens))
        width, clean = len(row.tokens), len(row.tokens) * (1 + self.law.probed)
        following = (len(part.tokens) - clean) // width
        begin = clean + ((outcome.kept or 0) - 1) * following
        return range(begin, begin + following)


class Linear(Windows):
    """Speculation whose windows, the seed noisy among them, are denoised in several drafts before they are verified:
    the linear speculation of Nemotron-Labs-Diffusion with its threshold (arXiv 2607.05722)."""

    acts = ("settled", "drafted", "completed")

    def next(self, row: Row) -> Part:
        return super().next(row) if row.drafting else self.confirming(row)

    def act(self, row: Row, part: Part) -> str:
        return "completed" if part.job == "draft" and self.last(row) else super().act(row, part)

    def wanted(self, row: Row, part: Part) -> list[int]:
        return list(self.law.says(len(row.tokens))) if part.job == "settle" else super().wanted(row, part)

    def slots(self, row: Row, part: Part) -> list[int]:
        if self.last(row):
            return [i for i, hidden in enumerate(row.hidden) if hidden]
        return super().slots(row, part)

    def last(self, row: Row) -> bool:
        """Whether this is the window's last draft."""
        return row.plan.drafts is not None and row.step + 1 >= row.plan.drafts

    def settled(self, answer: Answer) -> list[Outcome]:
        """What the verification keeps."""
        return verified(answer, root=0)

    def completed(self, answer: Answer) -> list[Outcome]:
        """The last draft of a window shows all that is hidden."""
        slots = [self.slots(row, part) for row, part in zip(answer.rows, answer.parts, strict=True)]
        positions = [[row.start + slot for slot in own] for row, own in zip(answer.rows, slots, strict=True)]
        drafts = said(answer.rows, positions, answer.all, final=0)
        for row, own, (tokens, law) in zip(answer.rows, slots, drafts, strict=True):
            row.reveal([(slot, token, True) for slot, token in zip(own, tokens, strict=True)], {})
            row.step, row.drawn = row.step + 1, law
        return [OPEN] * len(answer.rows)


def verified(answer: Answer, root: int) -> list[Outcome]:
    """What the clean pass over each window would have said itself; `root`: tokens that the round has gained before."""
    rows = answer.rows
    # A processor of the caller's may keep a state: it is asked for one slot after the other, as far as drafts are kept.
    stateful = [len(row.guessing or ()) < len(row.processors or ()) for row in rows]
    ends = [[row.start + 1 + i for i in range(len(row.tokens))] for row in rows]
    counts = [len(row.tokens) for row in rows]
    law = judged(rows, ends, answer.all, [0 if s else n for s, n in zip(stateful, counts, strict=True)])
    parts, want = law.split(counts), likeliest(law).tolist()
    found, at = [], 0
    for row, own, raw, asked, positions in zip(rows, parts, answer.logits, stateful, ends, strict=True):
        draft, best = row.tokens[1:], want[at : at + len(own)]
        at += len(own)
        uniform = [] if row.plan.warp is None else row.uniform(len(own))
        if asked:
            own, best = _one_by_one(row, raw, uniform, positions)
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


def _one_by_one(
    row: Row, logits: Tensor, uniform: Sequence[float], positions: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """A window's logits as the row's processors want them, up to the first draft that is not kept."""
    law, best = logits.clone(), [0] * len(logits)
    for i, end in enumerate(positions):
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
    said_by: Sequence[int],
) -> list[Guess]:  # fmt: skip
    """So many drafts behind these `tokens` of some rows, one after another: each is read off the slot that the token
    was `said_by`, and off what was drafted before it.

    Args:
        begins: positions of the text where the drafts begin.
    """
    reader, now = read.ahead(said_by), torch.tensor(tokens, device=read.hidden.device)
    if not any(row.plan.warp or row.guessing or row.record for row in rows):
        read.engine.stats.logits += sum(counts)
        return [(own[:n], None) for own, n in zip(reader.likeliest(now, max(counts)), counts, strict=True)]
    found: list[list[int]] = [[] for _ in rows]
    laws: list[list[Tensor]] = [[] for _ in rows]
    state = None
    for i in range(max(counts)):
        logits, state = reader(now, state)
        busy = [j for j, count in enumerate(counts) if i < count]
        positions = [[begins[j] + i] for j in busy]
        drafts = said([rows[j] for j in busy], positions, read.words(logits[busy]), final=0)
        for j, (own, law) in zip(busy, drafts, strict=True):
            found[j] += own
            laws[j] += [] if law is None else [law]
        now = torch.tensor([own[-1] for own in found], device=now.device)
    return [(own, torch.cat(law) if law else None) for own, law in zip(found, laws, strict=True)]
