"""Several blocks in flight: later blocks are drafted while the first is not finished (D2F, arXiv 2508.09192; d3LLM;
MBD-LM).

A block in flight sees what is settled, the blocks before it as they are, masks and all, and itself. So does clean text
on the grid: blocks in flight are clean blocks that nobody commits. A forward holds

    finished blocks   the leading ones without a mask: they are committed, and this is their clean pass
    blocks in flight  as many as the plan says at most; the next one joins once a share of the last is shown

In the first of those in flight the rule shows at least one slot, in the others what it is sure of, maybe nothing.
Behind a block that shows an end-of-text token none joins. Where blocks begin with a seed, that slot stays hidden until
the block before it has been committed.
"""

from collections.abc import Sequence

from hybrid.sampling.choosing.choice import judged
from hybrid.sampling.choosing.draft import reveal
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.schemes import OPEN, Answer, Outcome, Part, Windows, said, shapes


class InFlight(Windows):
    """`blocks_in_flight` above 1. A row's window is as many blocks, of which some have not joined yet."""

    def width(self, row: Row) -> int:
        return self.reach(row, row.start)

    @staticmethod
    def spare(plan: Plan) -> int:
        return plan.block_size

    def reach(self, row: Row, begin: int) -> int:
        """The width of a window that begins at `begin`: no block of it is all behind the limit."""
        size = self.law.unit
        return size * min(row.plan.blocks_in_flight, -(-(row.limit - begin) // size))

    def next(self, row: Row) -> Part:
        size, hidden, done = self.law.unit, list(row.hidden), 0
        while done < len(hidden) and not any(hidden[done : done + size]):
            done += size
        if done and not self.law.seeds:
            # What is settled is known already, so the blocks that follow join at once.
            hidden += [True] * (done + self.reach(row, row.start + done) - len(hidden))
        end = self.joined(row, hidden, done)
        tokens = [*row.tokens, *[row.fill] * (end - len(row.tokens))][:end]
        layout = shapes.clean(self.law, end)
        return Part(tokens, layout, "settle", ahead=end - done) if done else Part(tokens, layout, "draft")

    def joined(self, row: Row, hidden: Sequence[bool], done: int) -> int:
        """Where the last block in flight ends; those before `done` are finished."""
        size, known = self.law.unit, row.length - row.start
        for begin in range(done, len(hidden), size):
            end = begin + size
            over = any(token in row.plan.eos for token in row.tokens[max(begin, known) : end])
            if over or size - sum(hidden[begin:end]) < row.plan.block_add_threshold * size:
                return end
        return len(hidden)

    def slots(self, row: Row, part: Part) -> list[int]:
        hidden = [i for i, hidden in enumerate(row.hidden[: len(part.tokens)]) if hidden]
        return [i for i in hidden if i % self.law.unit] if self.law.seeds else hidden

    def wanted(self, row: Row, part: Part) -> list[int]:
        # A forward that commits is read for the seed alone; for its drafts, once the window has moved on.
        if part.job == "settle":
            return [len(part.tokens) - part.ahead - 1] if self.law.seeds else []
        answers = shapes.answers(self.law, len(part.tokens))  # where a block has a seed, its first slot asks nobody
        return [answers[i] for i in self.slots(row, part)]

    def settled(self, answer: Answer) -> list[Outcome]:
        """The finished blocks stand, and what was drafted behind them stays a draft."""
        rows, counts = answer.rows, [len(part.tokens) - part.ahead for part in answer.parts]
        seeds: list[int | None] = [None] * len(rows)
        if self.law.seeds:
            ends = [[row.start + count] for row, count in zip(rows, counts, strict=True)]
            seeds = [seed for (seed,), _ in said(rows, ends, answer.all)]
        found = []
        for row, count, seed in zip(rows, counts, seeds, strict=True):
            behind = zip(row.tokens[count:], row.hidden[count:], strict=True)
            drafts = [None if hidden else token for token, hidden in behind]
            drafts += [None] * (self.reach(row, row.start + count) - len(drafts))
            found.append(Outcome(count, seed, clean=True, drafts=drafts[seed is not None :]))
        return found

    def drafted(self, answer: Answer) -> list[Outcome]:
        """The rule shows some of each block, and in the first of a row some at any rate."""
        size, who, slots = self.law.unit, list[Row](), list[list[int]]()
        views, must = list[range](), list[bool]()
        for row, part in zip(answer.rows, answer.parts, strict=True):
            own = self.slots(row, part)
            for begin in sorted({slot // size * size for slot in own}):
                who.append(row)
                slots.append([slot for slot in own if begin <= slot < begin + size])
                views.append(range(begin, begin + size))
                # What was seen before its block had a seed is shown where it is sure, or not at all.
                must.append(begin <= own[0] and not (part.ahead and self.law.seeds))
        if who:
            ends = [[row.start + slot for slot in own] for row, own in zip(who, slots, strict=True)]
            reveal(who, slots, judged(who, ends, answer.all), views, must)
        return [Outcome(row.end - row.start) if row.closed else OPEN for row in answer.rows]
