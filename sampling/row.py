"""One text while it is decoded: what is settled of it, and the window that is open behind it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybrid.law import Law
from hybrid.sampling.choosing.choice import Warp, outside
from hybrid.sampling.record import Record, Watcher
from hybrid.sampling.reveal import Reveal
from hybrid.sampling.stats import RowStats
from hybrid.sampling.window import Window

if TYPE_CHECKING:
    from hybrid.sampling.schemes import Ar

Criterion = Any  # of transformers: a function of int64 [1, T] and None; true ends the row with its last token


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What was asked for, checked; rows share it.

    Attributes:
        mode: of `generate`, or "infill".
        law: of the model in this mode.
        scheme: what spends the forwards.
        block_size: the window, or the block of an order of reveal.
        adaptive: speculative windows are as wide as they pay, `block_size` at most.
        drafts: that a speculative window gets at most, the last of which shows all; None: as many as the rule takes.
        by_blocks: reveal in blocks of `block_size` where windows are longer.
        to_limit: windows reach to the end of the text.
        blocks_in_flight, block_add_threshold: blocks that are drafted at once, and the share of the last of them that
            has to be shown before the next one joins.
        reveal, steps: the rule, and how many drafts a window is meant to take; None: as many as it has slots.
        foreign_reveal: the rule is the caller's own, and is checked.
        sub_block_size: slots of a block that are filled before those behind them; None: all at once.
        eos: tokens that end a text.
        warp: of sampling; None is greedy.
        halt: what else can end a text.
        cache: the approximate cache, "prefix" or "dual"; None: what is exact.
        guidance: how far logits go from what a canvas without the prompt says; None: no such canvas is looked at.
    """

    mode: str
    law: Law
    scheme: "type[Ar]"
    block_size: int
    adaptive: bool
    drafts: int | None
    by_blocks: bool
    to_limit: bool
    blocks_in_flight: int
    block_add_threshold: float
    reveal: Reveal
    foreign_reveal: bool
    sub_block_size: int | None
    steps: int | None
    eos: tuple[int, ...]
    warp: Warp | None
    halt: Sequence[Criterion]
    cache: str | None
    guidance: float | None = None

    @property
    def remasks(self) -> bool:
        """Whether the rule may hide again what it has shown."""
        return bool(getattr(self.reveal, "remasks", False))


@dataclass(eq=False, kw_only=True)
class Row:
    """A text that grows until it ends.

    Attributes:
        index: by which its owner knows it; rows draw in this order.
        text: token ids; those from `length` on, where there are any, are gaps to be filled and what stands between.
        length, limit: tokens that are settled, and those that there will be at most.
        start: tokens that are committed, where the window begins.
        end: the position up to which the window may be revealed now.
        tokens, hidden, confidence, order: of the window's slots; the mask token where one is hidden.
        step: drafts of this window so far.
        processors, guessing: of logits of what stays, and of what is verified before it stays.
        looks_back: a processor looks at the text before a slot, which must then be known: drafts that stay as they are
            go from left to right, a slot each.
        drawn: `[K-1, V]`, the laws of which sampled speculative drafts were drawn.
        watchers: who is told what forwards do to it, a streamer as `Streaming`.
        place: in the cache.
        error: what a function of the caller's raised; the row ends with it.
    """

    plan: Plan
    index: int
    text: list[int]
    length: int
    limit: int
    generator: torch.Generator
    device: torch.device
    processors: Any = None
    guessing: Any = None
    looks_back: bool = False
    record: Record | None = None
    watchers: Sequence[Watcher] = ()
    window: Window | None = None
    stats: RowStats = field(default_factory=RowStats)
    start: int = 0
    end: int = 0
    tokens: list[int] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    order: list[float] = field(default_factory=list)
    step: int = 0
    drawn: Tensor | None = None
    target: int = 0  # tokens that prefill commits
    place: int = -1
    before: int = 0  # settled tokens before the last change
    opened: bool = False  # whether its window is
    finished: bool = False
    error: Exception | None = None
    admitted: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.law, self.prompt = self.plan.law, self.length
        self.fill = self.law.mask_token_id if self.law.mask_token_id is not None else 0
        self.infill = self.plan.mode == "infill"
        self.gaps = self.text.count(self.fill) if self.infill else 0
        self.target = self.law.begin(self.length)
        # Whether the prompt's last clean row says the first token.
        self.seeded = self.law.seeds and not self.infill and self.target == self.length

    @property
    def ready(self) -> bool:
        """Whether the prompt is in the cache."""
        return self.start >= self.target and not (self.seeded and self.length == self.prompt)

    @property
    def revealable(self) -> range:
        """Slots of the window that the rule may look at now."""
        if self.plan.by_blocks:
            return range(max(0, self.length - self.start), self.end - self.start)
        return range(len(self.tokens))

    @property
    def useful(self) -> int:
        """How many slots of the window may be text in the end: none behind an end-of-text token that is shown, none
        behind the limit. A rule that hides again may take that token back."""
        width, end = len(self.tokens), self.ends
        return width if self.plan.remasks else min(width if end is None else end + 1, self.limit - self.start)

    @property
    def ends(self) -> int | None:
        """The first slot of the window that shows an end-of-text token and is no text yet."""
        for slot in range(self.length - self.start, len(self.tokens)):
            if self.tokens[slot] in self.plan.eos and not self.hidden[slot]:
                return slot
        return None

    @property
    def drafting(self) -> bool:
        """Whether something is hidden that may be revealed, and that matters."""
        useful = self.useful
        return any(self.hidden[i] for i in self.revealable if i < useful)

    def width(self) -> int:
        """Of the next window."""
        if self.plan.to_limit:
            return self.limit - self.start
        return self.plan.block_size if self.window is None else self.window.width()

    def open(self, width: int, drafts: Sequence[int | None] = ()) -> None:
        """Lay a new window over the text, of `width` slots; `drafts` are known for those behind the text, None where a
        slot is hidden."""
        begin, plan = self.start, self.plan
        tokens: list[int | None] = [*self.text[begin : begin + width], *drafts]
        tokens += [None] * (width - len(tokens))
        self.tokens = [self.fill if token is None else token for token in tokens]
        self.hidden = [token is None or (self.infill and token == self.fill) for token in tokens]
        self.end = min(self.limit, begin + width)
        if plan.by_blocks:
            positions = [begin + i for i, hidden in enumerate(self.hidden) if hidden]
            self.end = min(self.limit, positions[0] + plan.block_size) if positions else self.limit
            if not positions or positions[-1] < self.end:
                self.end = self.limit
        self.confidence, self.step = [1.0] * width, 0
        self.order = [0.0] * width
        if getattr(plan.reveal, "in_order", False) and (count := sum(self.hidden)):
            drawn = iter(self.uniform(count))
            self.order = [next(drawn) if hidden else 0.0 for hidden in self.hidden]

    def uniform(self, count: int) -> list[float]:
        """Numbers in [0, 1) of the row's own, float64."""
        source = self.generator
        return torch.rand(count, dtype=torch.float64, device=source.device, generator=source).tolist()

    def drafted(self) -> list[bool]:
        """Slots that an earlier draft showed: those that a rule may hide again."""
        found = []
        for position, hidden in enumerate(self.hidden, self.start):
            own = self.length <= position < self.end and not hidden
            found.append(own and (not self.infill or self.text[position] == self.fill))
        return found

    def reveal(self, changes: Sequence[tuple[int, int, bool]], sure: Mapping[int, float]) -> None:
        """Take in what a rule made of a draft: slots with their tokens, shown (True) or hidden again; `sure`: how
        likely the model finds each guess, where a rule may ask. What is not shown leaves no mark: rows of a batch stay
        the rows alone."""
        self.tokens, self.hidden, self.confidence = list(self.tokens), list(self.hidden), list(self.confidence)
        again = [slot for slot, _, shown in changes if not shown]
        if self.looks_back and again:  # what stands behind was chosen by what is taken back, and goes with it
            drafted = [i for i, own in enumerate(self.drafted()) if own] + [slot for slot, _, shown in changes if shown]
            behind = {i for i in drafted if i > min(again)}
            changes = [c for c in changes if c[0] not in behind] + [(i, self.fill, False) for i in sorted(behind)]
        for slot, token, shown in changes:
            self.tokens[slot], self.hidden[slot] = token, not shown
            if shown:
                self.confidence[slot] = sure.get(slot, 1.0)

    @property
    def closed(self) -> bool:
        """Whether a drafted window needs no clean pass now, because nothing is to be verified or to follow."""
        if not self.law.cached or self.infill:
            return not self.drafting
        if self.plan.mode == "speculative":
            return False
        return not self.drafting and (self.ends is not None or self.end >= self.limit)

    def settle(self, kept: int, bonus: int | None, clean: bool) -> int:
        """Move the first `kept` window tokens to the text, and the token that follows where there is one. Nothing is
        kept behind an end-of-text token, a stop or the limit.

        Returns:
            How many tokens of the window are to be committed: those that were `clean` in the last forward.
        """
        new = self.tokens[:kept] if bonus is None else [*self.tokens[:kept], bonus]
        begin, length = self.start, min(self.start + len(new), self.limit)
        for position in range(self.length, length):
            if new[position - begin] in self.plan.eos:
                length, self.finished = position + 1, True
                break
        self.finished |= length >= self.limit
        text = self.text[:begin] + new[: length - begin]
        if self.plan.halt:
            length = self._halted(text, length)
        # Between gaps stands text that is given.
        self.text = text[:length] + (self.text[length:] if self.infill else [])
        self.before, self.length = self.length, length
        if length > self.prompt and self.stats.time_to_first_token is None:
            self.stats.time_to_first_token = time.perf_counter() - self.admitted
        if not clean:
            return 0
        commit = min(kept, length - begin) // self.law.unit * self.law.unit
        self.start += commit
        return commit

    def _halted(self, text: list[int], length: int) -> int:
        with outside():
            ids = torch.tensor([text[:length]], device=self.device)
            for end in range(self.length + 1, length + 1):
                if any(bool(torch.as_tensor(halt(ids[:, :end], None)).all()) for halt in self.plan.halt):
                    self.finished = True
                    return end
        return length

    @property
    def new(self) -> list[int]:
        """Tokens that the caller gets."""
        return self.text[self.prompt : self.length]
