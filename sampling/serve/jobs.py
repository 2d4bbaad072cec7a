"""What the decoding thread is given, and what it tells of it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hybrid.sampling.record import Chance, Step
from hybrid.sampling.request import Done, Request
from hybrid.sampling.serve.protocol import ApiError
from hybrid.sampling.serve.text import Text


@dataclass(frozen=True, kw_only=True)
class News:
    """What happened to a text in one forward.

    Attributes:
        text: new text that is final.
        tokens: that are final.
        chances: of the new tokens, where they are asked for.
        step: the forward, where drafts are asked for; `pieces` is the text of its settled tokens and of its window, and
            `confidence` how likely they were, behind `again` tokens that were told of before, whose text has changed:
            the rest of a character came.
    """

    text: str = ""
    tokens: Sequence[int] = ()
    chances: Sequence[Chance] = ()
    step: Step | None = None
    pieces: Sequence[str] = ()
    confidence: Sequence[float] = ()
    again: int = 0


@dataclass(frozen=True, kw_only=True)
class End:
    """How a text ended.

    Attributes:
        text: what was not sent yet of a stream; else all.
        reason: of the protocol.
        why: what ended it.
        error: instead of all that.
        waited, first: seconds until it had a place and its first token, since the request came.
    """

    text: str = ""
    done: Done | None = None
    reason: Literal["stop", "length"] = "stop"
    why: Literal["eos", "stop", "length", "time", "filled"] = "eos"
    error: ApiError | None = None
    waited: float = 0.0
    first: float | None = None
    seconds: float = 0.0


@dataclass(eq=False, kw_only=True)
class Job:
    """One text of a request.

    Attributes:
        request: what the session is given; its watchers and criteria are this job's.
        mode: it is decoded in.
        user: whose turn it takes.
        text: what makes text of its tokens; None: there is no tokenizer, or gaps are filled.
        watched, drafts, ids: news are told while it comes about, with the forwards, with token ids.
        pieces: makes text of single tokens.
        mask: the token that stands for a gap.
        tell: puts what happened where the client's answer is made; called in that thread.
        alive: nobody has taken it back.
    """

    request: Request
    mode: str
    user: str
    ends: frozenset[int]
    text: Text | None
    tell: Callable[["Job", News | End], None]
    loop: asyncio.AbstractEventLoop
    number: int = 0
    deadline: float = float("inf")
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    index: int = -1
    alive: bool = True
    watched: bool = False
    drafts: bool = False
    ids: bool = False
    pieces: Callable[[Sequence[int | None]], list[str]] = field(repr=False)
    mask: int | None = None
    told: list[tuple[int, str, float]] = field(default_factory=list)  # the last tokens, with their pieces
