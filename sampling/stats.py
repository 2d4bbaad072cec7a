"""The ledger: every batched forward counted once, and what a speed is made of."""

import time
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["prefill", "settle", "draft"]


@dataclass
class RowStats:
    """One row: tokens the caller got, and the forwards in which the row was active.

    Attributes:
        tokens: new tokens, the end-of-text token included, padding not.
        free: those that prefill gave, which are not new speed.
        prefill, settle, draft: forwards in which the row's prompt went in, it was settled, or drafted.
        accepted: tokens gained in each speculative round (accepted drafts and the token that follows).
        queued, time_to_first_token, seconds: since the row was there, until it had a place, its first new token (None:
            it got none), and its end.
    """

    tokens: int = 0
    free: int = 0
    prefill: int = 0
    settle: int = 0
    draft: int = 0
    accepted: list[int] = field(default_factory=list)
    queued: float = field(default=0.0, compare=False)
    time_to_first_token: float | None = field(default=None, compare=False)
    seconds: float = field(default=0.0, compare=False)

    @property
    def tokens_per_forward(self) -> float | None:
        """New tokens that prefill did not give, over the draft and settle forwards in which the row was active; None
        without such a forward."""
        return (self.tokens - self.free) / (self.settle + self.draft) if self.settle + self.draft else None

    @property
    def acceptance(self) -> float | None:
        """Mean tokens gained in a speculative round; None elsewhere."""
        return sum(self.accepted) / len(self.accepted) if self.accepted else None


@dataclass
class GenerationStats:
    """What one `generate` did, per row and in total.

    A forward is `prefill`, `settle` (it commits or verifies clean text) or `draft`; one that does several of
    these jobs, for different rows, counts once under the first that it does.

    Attributes:
        mode: how the text was decoded.
        rows: one `RowStats` a row, in the order of `sequences`.
        prefill, settle, draft: batched forwards of each kind.
        time_to_first_token: seconds until some row had its first new token; None if none got one.
        seconds: wall-clock seconds of the whole call.
        logits: slots whose logits were computed, over all rows and forwards.
        choice: with mode="auto", what was chosen and why.
        cache: the approximate cache that was asked for, "prefix" or "dual"; None: nothing was approximated.
    """

    mode: str
    rows: list[RowStats]
    prefill: int = 0
    settle: int = 0
    draft: int = 0
    time_to_first_token: float | None = None
    seconds: float = 0.0
    logits: int = 0
    choice: str | None = None
    cache: str | None = None
    started: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def approximate(self) -> bool:
        """Whether keys were reused that a forward over the whole text would have computed anew."""
        return self.cache is not None

    @property
    def forwards(self) -> int:
        """All batched forwards, prefill included."""
        return self.prefill + self.settle + self.draft

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(row.tokens for row in self.rows)

    @property
    def tokens_per_forward(self) -> float | None:
        """New tokens that prefill did not give, over the draft and settle forwards in which each row was
        active: 1.0 for `ar` at any batch size; None without such a forward."""
        forwards = sum(row.draft + row.settle for row in self.rows)
        return sum(row.tokens - row.free for row in self.rows) / forwards if forwards else None

    @property
    def tokens_per_draft(self) -> float | None:
        """The figure that papers report which leave settle forwards out of the count; None without drafts."""
        drafts = sum(row.draft for row in self.rows)
        return sum(row.tokens - row.free for row in self.rows) / drafts if drafts else None

    @property
    def acceptance(self) -> float | None:
        """Mean tokens gained in a speculative round, before the end of text cuts any off; None elsewhere."""
        rounds = [n for row in self.rows for n in row.accepted]
        return sum(rounds) / len(rounds) if rounds else None

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over the wall clock; 0 while that has not been stopped."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def count(self, kind: Kind) -> None:
        """Enter one batched forward."""
        setattr(self, kind, getattr(self, kind) + 1)

    def finish(self, rows: list[RowStats]) -> None:
        """Take in the rows of the call, and stop its clock."""
        self.rows, self.seconds = rows, time.perf_counter() - self.started
        firsts = [row.time_to_first_token for row in rows if row.time_to_first_token is not None]
        self.time_to_first_token = min(firsts, default=None)

    def __str__(self) -> str:
        per = self.tokens_per_forward
        speed = "no forward after prefill" if per is None else f"{per:.2f} tokens per forward"
        how = self.mode if self.cache is None else f"{self.mode}, approximate ({self.cache} cache)"
        return (
            f"{how}: {self.tokens} tokens, {speed} "
            f"({self.prefill} prefill, {self.settle} settle, {self.draft} draft), "
            f"{self.tokens_per_second:.0f} tokens/s"
        )
