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

import torch
from torch import Tensor

from hybrid.sampling.choosing.choice import choose, judged
from hybrid.sampling.choosing.draft import reveal
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.schemes import OPEN, Ar, Outcome, Part, Read, note, shapes


class InFlight(Ar):
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

    def take(self, rows: Sequence[Row], parts: Sequence[Part], read: Read) -> list[Outcome]:
        # A forward that commits is read for the seed alone; for its drafts, once the window has moved on.
        slots = [self.slots(row, part) for row, part in zip(rows, parts, strict=True)]
        wanted = [self.wanted(part, own) for part, own in zip(parts, slots, strict=True)]
        logits = read(wanted).split([len(own) for own in wanted])
        found = [OPEN] * len(rows)
        clean = [i for i, part in enumerate(parts) if part.job == "settle"]
        seeds = self.seeds([rows[i] for i in clean], [parts[i] for i in clean], [logits[i] for i in clean])
        for i, seed in zip(clean, seeds, strict=True):
            kept = len(parts[i].tokens) - parts[i].ahead
            behind = list(zip(rows[i].tokens, rows[i].hidden, strict=True))[kept:]
            drafts = [None if hidden else token for token, hidden in behind]
            drafts += [None] * (self.reach(rows[i], rows[i].start + kept) - len(drafts))
            found[i] = Outcome(kept, seed, clean=True, drafts=drafts[seed is not None :])
        self.draft(rows, parts, slots, logits)
        for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
            if part.job == "draft" and row.closed:
                found[i] = Outcome(row.end - row.start)
        return found

    def slots(self, row: Row, part: Part) -> list[int]:
        """What a draft may show."""
        if part.job == "settle":
            return []
        hidden = [i for i, hidden in enumerate(row.hidden[: len(part.tokens)]) if hidden]
        return [i for i in hidden if i % self.law.unit] if self.law.seeds else hidden

    def wanted(self, part: Part, slots: Sequence[int]) -> list[int]:
        """The slots of a part that somebody reads."""
        if part.job == "settle":
            return [len(part.tokens) - part.ahead - 1] if self.law.seeds else []
        answers = shapes.answers(self.law, len(part.tokens))  # where a block has a seed, its first slot asks nobody
        return [answers[i] for i in slots]

    def seeds(self, rows: Sequence[Row], parts: Sequence[Part], logits: Sequence[Tensor]) -> list[int | None]:
        """What follows the finished blocks, where the model says it."""
        if not (rows and self.law.seeds):
            return [None] * len(rows)
        ends = [[row.start + len(part.tokens) - part.ahead] for row, part in zip(rows, parts, strict=True)]
        law = judged(rows, ends, torch.cat(list(logits)))
        tokens, _ = choose(rows, [1] * len(rows), law)
        note(rows, ends, tokens, law)
        return [token for (token,) in tokens]

    def draft(
        self, rows: Sequence[Row], parts: Sequence[Part], slots: Sequence[Sequence[int]], logits: Sequence[Tensor]
    ) -> None:
        """Let the rule show some of each block, and in the first of a row some at any rate."""
        size, who, where = self.law.unit, list[Row](), list[list[int]]()
        views, must, laws = list[range](), list[bool](), list[Tensor]()
        for row, part, own, law in zip(rows, parts, slots, logits, strict=True):
            for begin in sorted({slot // size * size for slot in own}):
                who.append(row)
                where.append([slot for slot in own if begin <= slot < begin + size])
                views.append(range(begin, begin + size))
                # What was seen before its block had a seed is shown where it is sure, or not at all.
                must.append(begin <= own[0] and not (part.ahead and self.law.seeds))
            laws += [law] if own else []  # a forward that commits was read for a seed
        if who:
            ends = [[row.start + slot for slot in own] for row, own in zip(who, where, strict=True)]
            reveal(who, where, judged(who, ends, torch.cat(laws)), views, must)
