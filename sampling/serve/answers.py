"""From what became of jobs to OpenAI's answers, whole or chunk by chunk."""

import itertools
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from sse_starlette import ServerSentEvent

from hybrid.sampling.record import Chance
from hybrid.sampling.serve.asks import Ask
from hybrid.sampling.serve.jobs import End, Job, News
from hybrid.sampling.serve.protocol import Chat
from hybrid.sampling.serve.text import TokenBytes
from hybrid.texts import decode

LEAST = -9999.0  # how OpenAI's protocol writes a log-probability of minus infinity


def dumps(what: Any) -> str:
    return json.dumps(what, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Answer:
    """One request's."""

    def __init__(self, ask: Ask, model: str, tokenizer: Any, spell: TokenBytes | None) -> None:
        """`spell`: the bytes of tokens; None without a tokenizer."""
        self.ask, self.model, self.tokenizer, self.spell = ask, model, tokenizer, spell
        self.chat = isinstance(ask.body, Chat)
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        self.ids_too = ask.body.hybrid.return_token_ids or tokenizer is None
        self.offset = [len(echo) for echo in ask.echoes for _ in range(ask.body.n)]
        self.ends: dict[int, End] = {}

    # --- Whole ------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """When all jobs have ended."""
        choices = [self._choice(job, self.ends[job.number]) for job in self.ask.jobs]
        return self._head("chat.completion" if self.chat else "text_completion") | {
            "choices": choices, "usage": self.usage(),
        }  # fmt: skip

    def _choice(self, job: Job, end: End) -> dict[str, Any]:
        assert end.done is not None
        text, extra = end.text, {}
        if job.mode == "infill":
            text, extra["hybrid"] = self._filled(job, end.done.tokens)
        choice: dict[str, Any] = {"index": job.number, "finish_reason": end.reason}
        chances = list(end.done.chances or ())
        tokens = self._new(job, end)
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            choice["logprobs"] = {"content": self._chat_logs(tokens, chances)} if end.done.chances is not None else None
        else:
            echo = self.ask.echoes[job.number // self.ask.body.n]
            choice["text"] = echo + text
            before = job.request.ids if self.ask.scored else []
            told: list[Chance | None] = [None, *(end.done.prompt_chances or ())] if self.ask.scored else []
            logs = None
            if end.done.chances is not None:
                begin = 0 if self.ask.scored else len(echo)
                logs = self._text_logs([*before, *tokens], [*told, *chances], begin)
            choice["logprobs"] = logs
        if self.ids_too:
            choice["token_ids"] = end.done.tokens
        if end.why == "time":
            extra.setdefault("hybrid", {})["ended"] = "time"
        return choice | extra

    def _new(self, job: Job, end: End) -> list[int]:
        """The tokens that were made, those of gaps in their order."""
        assert end.done is not None
        if job.mode != "infill":
            return end.done.tokens
        return [new for old, new in zip(job.request.ids, end.done.tokens, strict=True) if old == job.mask]

    def _filled(self, job: Job, tokens: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """What was filled: between a prompt and its suffix that alone, else the whole text."""
        gaps, at = list[str](), 0
        for is_gap, group in itertools.groupby(job.request.ids, lambda token: token == job.mask):
            end = at + len(list(group))
            if is_gap and self.tokenizer is not None:
                gaps.append(decode(self.tokenizer, tokens[at:end], after=tokens[:at]))
            at = end
        if self.tokenizer is None:
            return "", {}
        if getattr(self.ask.body, "suffix", None) is not None:
            return gaps[0], {}
        return decode(self.tokenizer, tokens), {"gaps": gaps}

    def usage(self) -> dict[str, Any]:
        rows = [end.done.stats for end in self.ends.values() if end.done is not None]
        mask = self.ask.jobs[0].mask
        given = sum(token != mask for prompt in self.ask.prompts for token in prompt)
        made = sum(row.tokens for row in rows)
        counts = {kind: sum(getattr(row, kind) for row in rows) for kind in ("prefill", "settle", "draft")}
        paid = counts["settle"] + counts["draft"]
        rounds = [n for row in rows for n in row.accepted]
        firsts = [end.first for end in self.ends.values() if end.first is not None]
        own = {
            "mode": self.ask.jobs[0].mode, "forwards": counts,
            "tokens_per_forward": sum(row.tokens - row.free for row in rows) / paid if paid else None,
            "acceptance": sum(rounds) / len(rounds) if rounds else None,
            "time_to_first_token": min(firsts, default=None),
            "seconds": max((end.seconds for end in self.ends.values()), default=0.0),
            "waited": max((end.waited for end in self.ends.values()), default=0.0),
        }  # fmt: skip
        return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made, "hybrid": own}

    # --- In chunks --------------------------------------------------------------------------------

    def begin(self) -> Iterator[ServerSentEvent]:
        """What can be said before anything is decoded."""
        for job in self.ask.jobs:
            if self.chat:
                yield self._chunk(job, {"role": "assistant", "content": ""})
            elif echo := self.ask.echoes[job.number // self.ask.body.n]:
                yield self._chunk(job, echo)

    def news(self, job: Job, news: News) -> Iterator[ServerSentEvent]:
        if news.text or news.chances or (self.ids_too and news.tokens):
            yield self._chunk(job, news.text, None, news.tokens, news.chances)
        if (step := news.step) is not None:
            split, begin = news.again + len(step.settled), step.position - news.again
            place = begin if job.mode == "infill" else begin - len(job.request.ids)
            told = {
                "id": self.id, "object": "draft", "index": job.number, "forward": step.forward, "kind": step.kind,
                "place": place, "settled": news.pieces[:split],
                "window": [None if token is None else piece for token, piece in
                           zip(step.window, news.pieces[split:], strict=True)],
                "confidence": [round(chance, 4) for chance in news.confidence],
            }  # fmt: skip
            if job.mode == "infill":
                span = job.request.ids[begin : begin + len(news.pieces)]
                told["given"] = [token != job.mask for token in span]
            yield ServerSentEvent(dumps(told), event="draft", sep="\n")

    def end(self, job: Job, end: End) -> ServerSentEvent:
        text, extra = end.text, {}
        if job.mode == "infill" and end.done is not None:
            text, extra["hybrid"] = self._filled(job, end.done.tokens)
        if end.why == "time":
            extra.setdefault("hybrid", {})["ended"] = "time"
        late = job.mode == "infill" and end.done is not None and end.done.chances is not None
        tokens, chances = (self._new(job, end), end.done.chances or ()) if late and end.done is not None else ((), ())
        return self._chunk(job, text, end.reason, tokens, chances, extra)

    def _chunk(
        self, job: Job, text: Any, reason: str | None = None, tokens: Sequence[int] = (),
        chances: Sequence[Chance] = (), more: dict[str, Any] | None = None,
    ) -> ServerSentEvent:  # fmt: skip
        choice: dict[str, Any] = {"index": job.number, "finish_reason": reason, "logprobs": None}
        if self.chat:
            delta = text if isinstance(text, dict) else {"content": text} if text or not reason else {}
            choice["delta"] = delta
            if chances:
                choice["logprobs"] = {"content": self._chat_logs(tokens, chances)}
        else:
            choice["text"] = text
            if chances:
                choice["logprobs"] = self._text_logs(tokens, chances, self.offset[job.number])
            self.offset[job.number] += len(text)
        if self.ids_too:
            choice["token_ids"] = list(tokens)
        choice |= more or {}
        found = self._head("chat.completion.chunk" if self.chat else "text_completion") | {"choices": [choice]}
        if self._tells_usage:
            found["usage"] = None
        return ServerSentEvent(dumps(found), sep="\n")

    @property
    def _tells_usage(self) -> bool:
        options = self.ask.body.stream_options
        return options is not None and options.include_usage

    def close(self) -> Iterator[ServerSentEvent]:
        """Behind the last chunk."""
        if self._tells_usage:
            head = self._head("chat.completion.chunk" if self.chat else "text_completion")
            yield ServerSentEvent(dumps(head | {"choices": [], "usage": self.usage()}), sep="\n")
        yield ServerSentEvent("[DONE]", sep="\n")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    # --- Log-probabilities ------------------------------------------------------------------------

    def _name(self, token: int) -> str:
        return str(token) if self.spell is None else self.spell.name(token)

    def _chat_logs(self, tokens: Sequence[int], chances: Sequence[Chance]) -> list[dict[str, Any]]:
        def entry(token: int, log: float) -> dict[str, Any]:
            raw = None if self.spell is None else list(self.spell(token))
            return {"token": self._name(token), "logprob": max(log, LEAST), "bytes": raw}

        return [
            entry(token, chance.log_prob) | {"top_logprobs": [entry(*best) for best in chance.likeliest]}
            for token, chance in zip(tokens, chances, strict=True)
        ]

    def _text_logs(self, tokens: Sequence[int], chances: Sequence[Chance | None], begin: int) -> dict[str, Any]:
        names, special = [self._name(token) for token in tokens], () if self.spell is None else self.spell.special
        sizes = [0 if token in special else len(name) for token, name in zip(tokens, names, strict=True)]
        likeliest: list[dict[str, float] | None] = []
        for token, chance in zip(tokens, chances, strict=True):
            if chance is None:
                likeliest.append(None)
                continue
            best = {self._name(other): max(log, LEAST) for other, log in reversed(chance.likeliest)}
            likeliest.append(best | ({self._name(token): max(chance.log_prob, LEAST)} if chance.likeliest else {}))
        offsets = list(itertools.accumulate(sizes, initial=begin))[: len(names)]
        logs = [None if chance is None else max(chance.log_prob, LEAST) for chance in chances]
        return {"tokens": names, "token_logprobs": logs, "top_logprobs": likeliest, "text_offset": offsets}
