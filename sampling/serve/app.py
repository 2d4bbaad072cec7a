"""The routes: OpenAI's endpoints, the page, health and metrics; and how errors are told.

What becomes of one request:

1. `server.Guard` lets it in, or not (a key, the name of the host), and counts the answer.
2. `Service.answer` reads its body within the limits; `protocol.read` makes a `Completion` or `Chat` of it, or refuses
   it by the name of a field.
3. `grammar.Grammars` builds the automaton of its response_format, in a process of its own.
4. `asks.Asks.prepare` encodes its texts and makes a `jobs.Job` of each choice, in the one thread that encodes.
5. `decoder.Decoder.submit` lets the jobs wait for their turn. Its thread, which owns the session, takes them in, runs
   one forward after another, and tells what happened: `News` of a stream, and an `End`.
6. What is told comes back through a queue, and `answers.Answer` makes OpenAI's chunks of it, or the whole.
7. Whatever happened, the jobs are taken back at the end: a client that leaves frees its places at the next step.
"""

import asyncio
import contextlib
import copy
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hybrid.law import Law
from hybrid.sampling.reveal import rules
from hybrid.sampling.serve.answers import Answer, dumps, event
from hybrid.sampling.serve.asks import Asks
from hybrid.sampling.serve.decoder import Decoder
from hybrid.sampling.serve.grammar import Grammar, Grammars
from hybrid.sampling.serve.jobs import End, Job, News
from hybrid.sampling.serve.metrics import Metrics
from hybrid.sampling.serve.protocol import ApiError, Asked, Chat, Completion, Format, read
from hybrid.sampling.serve.text import TokenBytes

LOG = logging.getLogger("hybrid.serve")
PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
SAFE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache",
}  # fmt: skip
TO_BUILD = 16  # grammars that may wait to be built
CLOSE = {"Connection": "close"}

Told = AsyncIterator[tuple[Job, News | End]]


def ending() -> ApiError:
    """What those are told who come, or wait, while the server ends."""
    return ApiError(503, "The server is being shut down.", code="shutting_down", headers={"Retry-After": "5"})


@dataclass(kw_only=True)
class Service:
    """What the routes stand on.

    Attributes:
        name: of the model.
        api_key: that clients must send; None: none.
        log_text: whether prompts and answers are written to the log.
        loopback: whether this machine alone is answered.
    """

    name: str
    asks: Asks
    decoder: Decoder
    grammars: Grammars
    metrics: Metrics
    api_key: str | None = None
    log_text: bool = False
    loopback: bool = True
    closing: bool = False

    def __post_init__(self) -> None:
        self.limits, self.created = self.asks.limits, int(time.time())
        self.encoding = ThreadPoolExecutor(1, "encoding")
        self.building, self.to_build = ThreadPoolExecutor(1, "building"), 0
        # Of this thread's own: what encodes changes its tokenizer while it does.
        self.tokenizer = copy.deepcopy(self.asks.tokenizer)
        self.spell = None if self.tokenizer is None else TokenBytes(self.tokenizer)

    # --- Answers ----------------------------------------------------------------------------------

    async def answer(self, request: Request, kind: type[Asked]) -> Response:
        if self.closing:
            raise ending()
        arrived, loop, news = time.monotonic(), asyncio.get_running_loop(), asyncio.Queue[tuple[Job, News | End]]()
        body = read(kind, await self._body(request))
        if body.model != self.name:
            wrong = f"model: this server has {self.name!r}, and not {body.model[:100]!r}."
            raise ApiError(404, wrong, param="model", code="model_not_found")
        grammar = None if body.format is None else await self._grammar(body.format)

        def tell(job: Job, what: News | End) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(news.put_nowait, (job, what))

        user = body.user or (request.client.host if request.client else "")
        jobs = await loop.run_in_executor(self.encoding, self.asks.prepare, body, grammar, user, arrived, tell)
        answer = Answer(jobs, self.name, self.tokenizer, self.spell)
        self.decoder.submit(jobs)
        told = self._told(request, answer, news)
        if body.stream:
            # A client may have left before the first event is asked for.
            over = BackgroundTask(self.decoder.cancel, jobs)
            events = self._events(request, answer, told)
            return EventSourceResponse(events, ping=15, send_timeout=self.limits.sending, sep="\n", background=over)
        await self._until_over(request, answer, told)
        return Response(dumps(answer.whole()), media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        """What is sent, within the limits."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # A page of somebody else's may send other types without asking.
            raise ApiError(415, "Send JSON: content-type: application/json.")
        most, body = self.limits.body, bytearray()
        try:
            async with asyncio.timeout(self.limits.sending):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise ApiError(413, f"The body has more than {most} bytes.", headers=CLOSE)
        except TimeoutError:
            late = f"The body did not come within {self.limits.sending:.0f} seconds."
            raise ApiError(408, late, headers=CLOSE) from None
        return bytes(body)

    async def _grammar(self, asked: Format) -> Grammar:
        """Those who ask for grammars wait for one another, and nobody else for them."""
        if self.to_build >= TO_BUILD:
            wait = {"Retry-After": "10"}
            raise ApiError(429, "Too many grammars wait to be built.", code="queue_full", headers=wait)
        self.to_build += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.building, self.grammars.get, asked)
        finally:
            self.to_build -= 1

    async def _told(self, request: Request, answer: Answer, news: "asyncio.Queue[tuple[Job, News | End]]") -> Told:
        """What is told of a request, until all its jobs have ended, or one has failed."""
        while len(answer.ends) < len(answer.jobs):
            job, what = await news.get()
            if isinstance(what, End):
                if what.error is not None:
                    raise what.error
                answer.ends[job.number] = what
            yield job, what
        self._log(request, answer)

    async def _until_over(self, request: Request, answer: Answer, told: Told) -> None:
        """Wait for all jobs, as long as somebody waits for them."""

        async def listen() -> None:
            async for _ in told:
                pass

        # The body is read: what comes now is that the client has left.
        over, gone = asyncio.ensure_future(listen()), asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({over, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not over.done():
                raise ClientDisconnect
            over.result()
        finally:
            over.cancel()
            gone.cancel()
            self.decoder.cancel(answer.jobs)

    async def _events(self, request: Request, answer: Answer, told: Told) -> AsyncIterator[ServerSentEvent]:
        try:
            for chunk in answer.begin():
                yield chunk
            async for job, what in told:
                for chunk in answer.news(job, what) if isinstance(what, News) else (answer.end(job, what),):
                    yield chunk
            for chunk in answer.close():
                yield chunk
        except ApiError as error:
            self._log(request, answer, error)
            yield event(error.body)
        finally:
            self.decoder.cancel(answer.jobs)

    def _log(self, request: Request, answer: Answer, error: ApiError | None = None) -> None:
        usage, body = answer.usage(), answer.body
        told = {
            "id": answer.id, "path": request.url.path, "stream": body.stream, "texts": len(answer.jobs),
            "prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"],
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in usage["hybrid"].items()},
            "ended": [end.why for end in answer.ends.values()],
        }  # fmt: skip
        if error is not None:
            told["error"] = error.detail
        if self.log_text:
            told["asked"] = body.model_dump(include={"prompt", "suffix", "messages"}, exclude_none=True)
            told["text"] = answer.texts()
        LOG.info("text", extra={"told": told})

    # --- About the server -------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.name:
            raise ApiError(404, f"This server has {self.name!r} alone.", param="model", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        model, tokenizer, session = self.asks.model, self.tokenizer, self.decoder.session
        config, law = model.config, Law.of(model.config)
        limits = ("prompt", "max_tokens", "canvas", "window", "n", "seconds")
        own = {
            "modes": list(law.modes), "infill": law.refusal("infill") is None,
            "mode": session.options.get("mode") or model.generation_config.to_dict().get("mode") or "ar",
            "choice": session.stats.choice, "block_size": config.block_size, "reveal": sorted(rules()),
            "chat": bool(getattr(tokenizer, "chat_template", None)), "tokenizer": tokenizer is not None,
            "clean_attention": config.clean_attention, "structured_output": self.grammars.missing is None,
            "context": config.max_position_embeddings, "slots": session.slots,
            "limits": {name: getattr(self.limits, name) for name in limits},
        }  # fmt: skip
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "hybrid", "hybrid": own}

    async def health(self, request: Request) -> Response:
        good, decoder = self.decoder.alive and not self.closing, self.decoder
        status = "ok" if good else "closing" if self.closing else "failed"
        told = {"status": status, "model": self.name, "active": decoder.active, "waiting": decoder.waiting}
        return JSONResponse(told, status_code=200 if good else 503)

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def said(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status_code, headers=error.headers)


async def _refusal(request: Request, error: Exception) -> Response:
    """Of a request that failed, whoever noticed it."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, ApiError):
        return said(error)
    if isinstance(error, HTTPException):
        missing, wrong = f"There is nothing at {request.url.path[:200]}.", f"{request.method} is not for this address."
        why = {404: missing, 405: wrong}.get(error.status_code, str(error.detail))
        return said(ApiError(error.status_code, why, headers=dict(error.headers or {})))
    return said(ApiError(500, f"The server failed on this request ({type(error).__name__}), and goes on."))


def app_of(service: Service, guards: list[Middleware]) -> Starlette:
    """The application, behind those who guard it."""
    page = [  # read once: no request names a file
        Route(
            "/" if path.name == "index.html" else f"/{path.name}",
            Response(path.read_bytes(), media_type=KINDS[path.suffix], headers=SAFE), methods=["GET"],
        )
        for path in sorted(PAGE.iterdir()) if path.suffix in KINDS
    ]  # fmt: skip
    routes = [
        *page,
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/v1/completions", partial(service.answer, kind=Completion), methods=["POST"]),
        Route("/v1/chat/completions", partial(service.answer, kind=Chat), methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.prometheus),
    ]
    handlers = dict.fromkeys((HTTPException, ClientDisconnect, Exception), _refusal)
    return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)
