"""One text of a request: what the session is given, and what is told of it while it comes about and when it ends."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hybrid.sampling.display.pieces import Pieces
from hybrid.sampling.record import Chance, Step
from hybrid.sampling.request import Done, Request
from hybrid.sampling.row import Plan
from hybrid.sampling.serve.protocol import ApiError, Asked
from hybrid.sampling.serve.text import LONGEST, Text


@dataclass(frozen=True, kw_only=True)
class News:
    """What happened to a text in one forward.

    Attributes:
        text: new text that is final.
        tokens: that are final.
        chances: of the new tokens, where they are asked for.
        draft: the forward as it is told, where drafts are asked for.
    """

    text: str = ""
    tokens: Sequence[int] = ()
    chances: Sequence[Chance] = ()
    draft: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class End:
    """How a text ended.

    Attributes:
        text: what was not sent yet of a stream; else all.
        why: what ended it.
        error: instead of all that.
        waited, first: seconds until it had a place and its first token, since the request came.
    """

    text: str = ""
    done: Done | None = None
    why: Literal["eos", "stop", "length", "time", "filled"] = "eos"
    error: ApiError | None = None
    waited: float = 0.0
    first: float | None = None
    seconds: float = 0.0

    @property
    def reason(self) -> Literal["stop", "length"]:
        """Of the protocol."""
        return "length" if self.why in ("length", "time") else "stop"


@dataclass(eq=False, kw_only=True)
class Job:
    """One text of a request.

    Attributes:
        body: the request.
        request: what the session is given; its watchers and criteria are this job's.
        plan: how it is decoded.
        text: what makes text of its tokens; None: there is no tokenizer, or gaps are filled.
        pieces: makes text of single tokens; None: there is no tokenizer.
        user: whose turn it takes.
        turn: which of the turns that is.
        echo: what stands before its text in the answer.
        tell: puts what happened where the client's answer is made.
        number: of the text in its request.
        arrived, deadline, started: when its request came, has to be answered, and got a place.
        index: the session's number of it.
        alive: nobody has taken it back.
    """

    body: Asked
    request: Request
    plan: Plan
    text: Text | None
    pieces: Pieces | None
    user: str
    tell: Callable[["Job", News | End], None]
    number: int
    echo: str
    arrived: float
    deadline: float
    started: float = 0.0
    index: int = -1
    turn: int = 0
    alive: bool = True
    _told: list[tuple[int, str, float]] = field(default_factory=list)  # the last tokens, with their pieces

    def __post_init__(self) -> None:
        self.mode, self.mask = self.plan.mode, self.plan.law.mask_token_id
        self.ids_too = self.body.hybrid.return_token_ids or self.pieces is None
        if self.body.stream:
            self.request.options["watchers"] = [self.watch]

    def watch(self, steps: Sequence[Step]) -> None:
        """Tell of forwards, in the thread that runs them. Of gaps, drafts alone: the rest comes with the whole text."""
        for step in steps:
            text, settled, chances = "", step.settled, step.chances
            if self.mode == "infill":
                settled, chances = [], ()
            if self.text is not None:
                # Where there are stop strings, the criterion has added what is settled.
                self.text.add(settled[self.text.count - (step.position - len(self.request.ids)) :])
                text = self.text.take()
            draft = self._draft(step) if self.body.hybrid.drafts else None
            if text or chances or draft or (self.ids_too and settled):
                self.tell(self, News(text=text, tokens=settled, chances=chances, draft=draft))

    def _draft(self, step: Step) -> dict[str, Any]:
        """The pieces that a forward settled and drafted, and how likely they were; with those before them whose text
        has changed, for the rest of a character came."""
        before, given = self._told, self.request.ids
        tokens = [*(token for token, _, _ in before), *step.settled]
        confidence = [*(chance for _, _, chance in before), *step.confidence]
        pieces = self._pieces([*tokens, *step.window])
        same = next((i for i, (_, piece, _) in enumerate(before) if piece != pieces[i]), len(before))
        if step.settled:
            self._told = list(zip(tokens, pieces, confidence, strict=False))[-(LONGEST - 1) :]
        place, window = step.position - len(before) + same, zip(step.window, pieces[len(tokens) :], strict=True)
        told = {
            "forward": step.forward, "kind": step.kind, "place": place - len(given),
            "settled": pieces[same : len(tokens)],
            "window": [None if token is None else piece for token, piece in window],
            "confidence": [round(chance, 4) for chance in confidence[same:]],
        }  # fmt: skip
        if self.mode == "infill":
            told["place"] = place
            told["given"] = [token != self.mask for token in given[place : place + len(pieces) - same]]
        return told

    def _pieces(self, tokens: Sequence[int | None]) -> list[str]:
        if self.pieces is None:
            return ["" if token is None else f"{token} " for token in tokens]
        known = len(self.pieces.tokenizer)  # models have more rows of the vocabulary than tokenizers have tokens
        return self.pieces([None if token is None or token >= known else token for token in tokens])

    def end(self, done: Done, late: bool) -> End:
        """How it ended; `late`: it was taken out, for its time was over."""
        text = ""
        if self.text is not None:
            self.text.add(done.tokens[self.text.count :])
            text = self.text.take(last=True)
        waited, first = self.started - self.arrived, done.stats.time_to_first_token
        return End(
            text=text, done=done, why=self._why(done, late), waited=waited + done.stats.queued,
            first=None if first is None else waited + first, seconds=time.monotonic() - self.arrived,
        )  # fmt: skip

    def _why(self, done: Done, late: bool) -> Literal["eos", "stop", "length", "time", "filled"]:
        if self.mode == "infill":
            return "time" if late else "filled"
        if self.text is not None and self.text.stopped:
            return "stop"
        if done.tokens and done.tokens[-1] in self.plan.eos:
            return "eos"
        return "time" if late else "length"
