"""From what became of jobs to OpenAI's answers, whole or chunk by chunk."""

import itertools
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from sse_starlette import ServerSentEvent

from hybrid.sampling.record import Chance
from hybrid.sampling.serve.jobs import End, Job, News
from hybrid.sampling.serve.protocol import Chat
from hybrid.sampling.serve.text import TokenBytes
from hybrid.sampling.stats import GenerationStats
from hybrid.texts import decode

LEAST = -9999.0  # how OpenAI's protocol writes a log-probability of minus infinity


def dumps(what: Any) -> str:
    return json.dumps(what, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(what: Any, kind: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(what if isinstance(what, str) else dumps(what), event=kind, sep="\n")


class Answer:
    """One request's.

    Attributes:
        ends: of the jobs that have ended, by number.
    """

    def __init__(self, jobs: Sequence[Job], model: str, tokenizer: Any, spell: TokenBytes | None) -> None:
        """`spell`: the bytes of tokens; None without a tokenizer."""
        self.jobs, self.body, self.tokenizer, self.spell = jobs, jobs[0].body, tokenizer, spell
        self.chat, self.ends = isinstance(self.body, Chat), dict[int, End]()
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.head = {
            "id": self.id, "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()), "model": model,
        }  # fmt: skip
        options = self.body.stream_options
        self.tells_usage = options is not None and options.include_usage
        # Where in the text of each choice the next token is that has a log-probability.
        self.offset = [0 if self.body.scored else len(job.echo) for job in jobs]

    # --- Whole ------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """When all jobs have ended."""
        choices = [self._whole(job, self.ends[job.number]) for job in self.jobs]
        return self.head | {"choices": choices, "usage": self.usage()}

    def _whole(self, job: Job, end: End) -> dict[str, Any]:
        assert end.done is not None
        text, own = self._text(job, end)
        if self.chat:
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            said = {"text": job.echo + text}
        return self._choice(job, said, end.done.tokens, self._all_logs(job, end), end.reason, own)

    def _choice(
        self, job: Job, said: dict[str, Any], tokens: Sequence[int], logs: dict[str, Any] | None, reason: str | None,
        own: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        choice = {"index": job.number, **said, "logprobs": logs, "finish_reason": reason}
        if job.ids_too:
            choice["token_ids"] = list(tokens)
        return choice | ({"hybrid": own} if own else {})

    def _text(self, job: Job, end: End) -> tuple[str, dict[str, Any]]:
        """What is left to be said at the end, and what stands under `hybrid`. Of gaps: what was filled, where there is
        one between a prompt and its suffix; else the whole text."""
        assert end.done is not None
        own: dict[str, Any] = {"ended": "time"} if end.why == "time" else {}
        if job.mode != "infill" or self.tokenizer is None:
            return end.text, own
        given, tokens = job.request.ids, end.done.tokens
        places = itertools.groupby(range(len(given)), lambda place: given[place] == job.mask)
        gaps = [list(run) for is_gap, run in places if is_gap]
        filled = [decode(self.tokenizer, tokens[gap[0] : gap[-1] + 1], after=tokens[: gap[0]]) for gap in gaps]
        if self.body.suffix is not None:
            return filled[0], own
        return decode(self.tokenizer, tokens), own | {"gaps": filled}

    def texts(self) -> list[str]:
        """Of the jobs that have ended, whole, whatever was sent of them before."""
        ended = [(job, self.ends[job.number]) for job in self.jobs if job.number in self.ends]
        return [self._text(job, end)[0] if job.text is None else job.text.text for job, end in ended]

    def usage(self) -> dict[str, Any]:
        """Of the jobs that have ended."""
        ends, mask = self.ends.values(), self.jobs[0].mask
        stats = GenerationStats(self.jobs[0].mode, [end.done.stats for end in ends if end.done is not None])
        given = sum(token != mask for job in self.jobs[:: self.body.n] for token in job.request.ids)
        own = {
            "mode": stats.mode,
            "forwards": {k: sum(getattr(row, k) for row in stats.rows) for k in ("prefill", "settle", "draft")},
            "tokens_per_forward": stats.tokens_per_forward, "acceptance": stats.acceptance,
            "time_to_first_token": min((end.first for end in ends if end.first is not None), default=None),
            "seconds": max((end.seconds for end in ends), default=0.0),
            "waited": max((end.waited for end in ends), default=0.0),
        }  # fmt: skip
        return {
            "prompt_tokens": given, "completion_tokens": stats.tokens, "total_tokens": given + stats.tokens,
            "hybrid": own,
        }  # fmt: skip

    # --- In chunks --------------------------------------------------------------------------------

    def begin(self) -> Iterator[ServerSentEvent]:
        """What can be said before anything is decoded."""
        for job in self.jobs:
            if self.chat:
                yield self._chunk(job, {"delta": {"role": "assistant", "content": ""}})
            elif job.echo:
                yield self._chunk(job, {"text": job.echo})

    def news(self, job: Job, news: News) -> Iterator[ServerSentEvent]:
        """What a forward brought."""
        if news.text or news.chances or (job.ids_too and news.tokens):
            said = {"delta": {"content": news.text}} if self.chat else {"text": news.text}
            logs = self._logs(job, news.tokens, news.chances) if news.chances else None
            yield self._chunk(job, said, news.tokens, logs)
        if news.draft is not None:
            yield event({"id": self.id, "object": "draft", "index": job.number, **news.draft}, "draft")

    def end(self, job: Job, end: End) -> ServerSentEvent:
        """The last chunk of a choice, which has all of it where gaps were filled."""
        assert end.done is not None
        text, own = self._text(job, end)
        said = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        filled = job.mode == "infill"
        tokens, logs = (end.done.tokens, self._all_logs(job, end)) if filled else ((), None)
        return self._chunk(job, said, tokens, logs, end.reason, own)

    def close(self) -> Iterator[ServerSentEvent]:
        """Behind the last chunk."""
        if self.tells_usage:
            yield self._event([], self.usage())
        yield event("[DONE]")

    def _chunk(
        self, job: Job, said: dict[str, Any], tokens: Sequence[int] = (), logs: dict[str, Any] | None = None,
        reason: str | None = None, own: dict[str, Any] | None = None,
    ) -> ServerSentEvent:  # fmt: skip
        return self._event([self._choice(job, said, tokens, logs, reason, own or {})])

    def _event(self, choices: list[Any], usage: dict[str, Any] | None = None) -> ServerSentEvent:
        kind = {"object": "chat.completion.chunk"} if self.chat else {}
        return event(self.head | kind | {"choices": choices} | ({"usage": usage} if self.tells_usage else {}))

    # --- Log-probabilities ------------------------------------------------------------------------

    def _all_logs(self, job: Job, end: End) -> dict[str, Any] | None:
        """Of all new tokens, those of gaps in their order; before them those of the prompt, where it is scored."""
        done, ids = end.done, job.request.ids
        assert done is not None
        if done.chances is None:
            return None
        if self.body.scored:
            return self._logs(job, [*ids, *done.tokens], [None, *(done.prompt_chances or ()), *done.chances])
        filled = [new for old, new in zip(ids, done.tokens, strict=False) if old == job.mask]
        return self._logs(job, filled if job.mode == "infill" else done.tokens, done.chances)

    def _logs(self, job: Job, tokens: Sequence[int], chances: Sequence[Chance | None]) -> dict[str, Any]:
        told = list(zip(tokens, chances, strict=True))
        if self.chat:
            return {"content": [self._entry(token, chance) for token, chance in told if chance is not None]}
        *begins, self.offset[job.number] = itertools.accumulate(
            map(self._characters, tokens), initial=self.offset[job.number]
        )  # fmt: skip
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [None if chance is None else max(chance.log_prob, LEAST) for chance in chances],
            "top_logprobs": [None if chance is None else self._best(token, chance) for token, chance in told],
            "text_offset": begins,
        }  # fmt: skip

    def _entry(self, token: int, chance: Chance) -> dict[str, Any]:
        """Of a chat."""

        def entry(token: int, log: float) -> dict[str, Any]:
            raw = None if self.spell is None else list(self.spell(token))
            return {"token": self._name(token), "logprob": max(log, LEAST), "bytes": raw}

        return entry(token, chance.log_prob) | {"top_logprobs": [entry(*best) for best in chance.likeliest]}

    def _best(self, token: int, chance: Chance) -> dict[str, float]:
        """By name: of two tokens of one name the likelier counts, and the token that was taken before all."""
        own = [(token, chance.log_prob)] if chance.likeliest else []
        return {self._name(other): max(log, LEAST) for other, log in [*reversed(chance.likeliest), *own]}

    def _characters(self, token: int) -> int:
        """How many of the text begin with it: bytes that go on with a character begin none."""
        if self.spell is None or token in self.spell.special:
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in self.spell(token))

    def _name(self, token: int) -> str:
        return str(token) if self.spell is None else self.spell.name(token)
