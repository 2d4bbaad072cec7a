"""What the decode loop is given, and what it knows of the rows it works on.

Shapes: A active rows, K window slots, N places of the text buffer, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hybrid.sampling.choice import Chooser
from hybrid.sampling.halt import Halt
from hybrid.sampling.record import Record
from hybrid.sampling.reveal import Reveal
from hybrid.sampling.window import Window


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the loop needs to know of a call.

    Attributes:
        limits: the length at which each row ends.
        window: what chooses the width of speculative windows; None for a fixed `block_size`.
        by_blocks: reveal in blocks of `block_size` where windows are longer.
        foreign_reveal: the rule is the caller's own, and is checked.
        record: what is written down of every token; None: nothing.
        cache: the approximate cache, "prefix" or "dual"; None: what is exact.
    """

    mode: str
    limits: list[int]
    block_size: int
    window: Window | None
    by_blocks: bool
    reveal: Reveal
    foreign_reveal: bool
    steps: int | None
    eos: tuple[int, ...]
    chooser: Chooser
    halt: Halt
    record: Record | None
    cache: str | None = None


class Rows(NamedTuple):
    """The rows that are not finished. `text` holds the mask token where nothing is settled yet."""

    text: Tensor  # [A, N]
    length: Tensor  # [A] settled tokens
    limit: Tensor  # [A] the length at which the row ends
    start: Tensor  # [A] the window's first place
    end: Tensor  # [A] the place up to which the window may be revealed now
    tokens: Tensor  # [A, K]
    hidden: Tensor  # [A, K]
    confidence: Tensor  # [A, K]
    step: Tensor  # [A] drafts of this window so far
    order: Tensor  # [A, K] a random order of reveal, for rules that want one
    probs: Tensor  # [A, K-1, V] the law of sampled speculative drafts; empty elsewhere

    def select(self, index: Tensor) -> "Rows":
        return Rows(*(x[index] for x in self))
