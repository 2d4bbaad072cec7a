"""The routes: OpenAI's endpoints, the page, health and metrics; who may ask, and how errors are told."""

import asyncio
import copy
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid.law import Law
from hybrid.sampling.reveal import rules
from hybrid.sampling.serve.answers import Answer, dumps
from hybrid.sampling.serve.asks import Ask, Asks
from hybrid.sampling.serve.decoder import Decoder
from hybrid.sampling.serve.grammar import Grammar
from hybrid.sampling.serve.jobs import End, Job, News
from hybrid.sampling.serve.metrics import Metrics
from hybrid.sampling.serve.protocol import ApiError, Asked, Chat, Completion, Format, read
from hybrid.sampling.serve.text import TokenBytes

LOG = logging.getLogger("hybrid.serve")
PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SAFE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache",
}  # fmt: skip
TO_BUILD = 16  # grammars that may wait to be built
ENDING = "The server is being shut down."


class Service:
    """What the routes stand on."""

    def __init__(
        self, *, name: str, asks: Asks, decoder: Decoder, metrics: Metrics, api_key: str | None = None,
        log_text: bool = False, loopback: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.asks, self.decoder, self.metrics = name, asks, decoder, metrics
        self.limits, self.log_text, self.loopback = asks.limits, log_text, loopback
        self.key = None if api_key is None else api_key.encode()
        self.created = int(time.time())
        self.closing = False
        self.encoding = ThreadPoolExecutor(1, "encoding")
        self.building, self.to_build = ThreadPoolExecutor(1, "building"), 0
        # Of this thread's own: what encodes changes its tokenizer while it does.
        self.tokenizer = copy.deepcopy(asks.tokenizer)
        self.spell = None if self.tokenizer is None else TokenBytes(self.tokenizer)

    # --- Answers ----------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, Completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, Chat)

    async def _answer(self, request: Request, kind: type[Asked]) -> Response:
        if self.closing:
            raise ApiError(503, ENDING, code="shutting_down", headers={"Retry-After": "5"})
        body = read(kind, await self._body(request))
        if body.model != self.name:
            raise ApiError(
                404, f"model: this server has {self.name!r}, and not {body.model[:100]!r}.", param="model",
                code="model_not_found",
            )  # fmt: skip
        news: asyncio.Queue[tuple[Job, News | End]] = asyncio.Queue()
        user = body.user or (request.client.host if request.client else "")
        loop, grammar = asyncio.get_running_loop(), None
        if body.response_format is not None and body.response_format.type != "text":
            grammar = await self._grammar(body.response_format)

        def tell(job: Job, what: News | End) -> None:
            news.put_nowait((job, what))

        ask = await loop.run_in_executor(self.encoding, self.asks.prepare, body, grammar, user, tell, loop)
        answer = Answer(ask, self.name, self.tokenizer, self.spell)
        self.decoder.submit(ask.jobs)
        if body.stream:
            # A client may have left before the first event is asked for.
            over = BackgroundTask(self.decoder.cancel, ask.jobs)
            events = self._events(request, ask, answer, news)
            return EventSourceResponse(events, ping=15, send_timeout=self.limits.sending, sep="\n", background=over)
        try:
            await self._until_ended(request, ask, answer, news)
        finally:
            self.decoder.cancel(ask.jobs)
        self._log(request, ask, answer)
        return Response(dumps(answer.whole()), media_type="application/json")

    async def _grammar(self, asked: Format) -> Grammar:
        """Those who ask for grammars wait for one another, and nobody else for them."""
        if self.to_build >= TO_BUILD:
            wait = {"Retry-After": "10"}
            raise ApiError(429, "Too many grammars wait to be built.", code="queue_full", headers=wait)
        self.to_build += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.building, self.asks.grammar, asked)
        finally:
            self.to_build -= 1

    async def _until_ended(
        self, request: Request, ask: Ask, answer: Answer, news: "asyncio.Queue[tuple[Job, News | End]]"
    ) -> None:
        """Wait for all jobs, as long as somebody waits for them."""
        gone = asyncio.ensure_future(request.receive())  # the body is read: what comes is that the client has left
        try:
            while len(answer.ends) < len(ask.jobs):
                told = asyncio.ensure_future(news.get())
                done, _ = await asyncio.wait({told, gone}, return_when=asyncio.FIRST_COMPLETED)
                if told not in done:
                    told.cancel()
                    raise ClientDisconnect
                job, what = told.result()
                if isinstance(what, End):
                    if what.error is not None:
                        raise what.error
                    answer.ends[job.number] = what
        finally:
            gone.cancel()

    async def _events(
        self, request: Request, ask: Ask, answer: Answer, news: "asyncio.Queue[tuple[Job, News | End]]"
    ) -> AsyncIterator[ServerSentEvent]:
        try:
            for event in answer.begin():
                yield event
            while len(answer.ends) < len(ask.jobs):
                job, what = await news.get()
                if isinstance(what, News):
                    for event in answer.news(job, what):
                        yield event
                elif what.error is not None:
                    self._log(request, ask, answer, what.error)
                    yield ServerSentEvent(dumps(what.error.body), sep="\n")
                    return
                else:
                    answer.ends[job.number] = what
                    yield answer.end(job, what)
            self._log(request, ask, answer)
            for event in answer.close():
                yield event
        finally:
            self.decoder.cancel(ask.jobs)

    async def _body(self, request: Request) -> bytes:
        """What is sent, within the limits."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # A page of somebody else's may send other types without asking.
            raise ApiError(415, "Send JSON: content-type: application/json.")
        most, parts, size = self.limits.body, list[bytes](), 0
        too_large = ApiError(413, f"The body has more than {most} bytes.", headers={"Connection": "close"})
        length = request.headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.sending):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            late = f"The body did not come within {self.limits.sending:.0f} seconds."
            raise ApiError(408, late, headers={"Connection": "close"}) from None
        return b"".join(parts)

    def _log(self, request: Request, ask: Ask, answer: Answer, error: ApiError | None = None) -> None:
        usage = answer.usage()
        told = {
            "id": answer.id, "path": request.url.path, "stream": ask.body.stream, "texts": len(ask.jobs),
            "prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"],
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in usage["hybrid"].items()},
            "ended": [end.why for end in answer.ends.values()],
        }  # fmt: skip
        if error is not None:
            told["error"] = error.message
        if self.log_text:
            told["asked"] = ask.body.model_dump(include={"prompt", "suffix", "messages"}, exclude_none=True)
            told["text"] = [end.text for end in answer.ends.values()]
        LOG.info("text", extra={"told": told})

    # --- About the server -------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.name:
            raise ApiError(404, f"This server has {self.name!r} alone.", param="model", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        model, limits, tokenizer = self.asks.model, self.limits, self.asks.tokenizer
        law, session = Law.of(model.config), self.decoder.session
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "hybrid",
            "hybrid": {
                "modes": list(law.modes), "infill": law.refusal("infill") is None,
                "mode": session.options.get("mode") or model.generation_config.to_dict().get("mode") or "ar",
                "choice": session.stats.choice, "block_size": model.config.block_size, "reveal": sorted(rules()),
                "chat": bool(getattr(tokenizer, "chat_template", None)), "tokenizer": tokenizer is not None,
                "clean_attention": model.config.clean_attention,
                "structured_output": self.asks.grammars is not None,
                "context": model.config.max_position_embeddings, "slots": session.slots,
                "limits": {
                    "prompt": limits.prompt, "max_tokens": limits.max_tokens, "canvas": limits.canvas,
                    "window": limits.window, "n": limits.n, "seconds": limits.seconds,
                },
            },
        }  # fmt: skip

    async def health(self, request: Request) -> Response:
        good = self.decoder.alive and not self.closing
        told = {
            "status": "ok" if good else "closing" if self.closing else "failed", "model": self.name,
            "active": self.decoder.session.active, "waiting": self.decoder.waiting,
        }  # fmt: skip
        return JSONResponse(told, status_code=200 if good else 503)

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


class Guard:
    """Before everything: who may ask; behind it: what is counted and told of each answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"]
        try:
            if (refused := self._refused(Headers(scope=scope), scope)) is not None:
                return await _told(refused)(scope, receive, watched)
            await self.app(scope, receive, watched)
        finally:
            known = path if path in KNOWN else "other"
            self.service.metrics.requests.labels(known, str(status or 499)).inc()
            seconds = round(time.monotonic() - begun, 4)
            told = {"method": scope["method"], "path": path[:200], "status": status or 499, "seconds": seconds}
            LOG.log(logging.DEBUG if path in ("/health", "/metrics") else logging.INFO, "answer", extra={"told": told})

    def _refused(self, headers: Headers, scope: Scope) -> ApiError | None:
        if self.service.loopback:
            # A page of somebody else's whose name was made to lead here would name itself.
            host = urlsplit("//" + headers.get("host", "")).hostname if "@" not in headers.get("host", "") else None
            if host not in LOOPBACK:
                return ApiError(403, "host: this server answers on this machine alone (localhost).")
        guarded = scope["path"].startswith("/v1") or scope["path"] == "/metrics"
        if self.service.key is not None and guarded and scope["method"] != "OPTIONS":
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.service.key)
            if kind.lower() != "bearer" or not right:
                return ApiError(
                    401, "Send the server's key: Authorization: Bearer KEY.", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        return None


KNOWN = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


def _told(error: ApiError) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _told(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: f"There is nothing at {request.url.path[:200]}.", 405: f"{request.method} is not for this address."}
    headers = dict(error.headers or {})
    return _told(ApiError(error.status_code, said.get(error.status_code, str(error.detail)), headers=headers))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    return _told(ApiError(500, f"The server failed on this request ({type(error).__name__}), and goes on."))


def _files() -> Iterator[Route]:
    """The page, read once: no request names a file."""
    for path in sorted(PAGE.iterdir()):
        if path.suffix in KINDS:
            content, kind = path.read_bytes(), KINDS[path.suffix]

            async def answer(request: Request, content: bytes = content, kind: str = kind) -> Response:
                return Response(content, media_type=kind, headers=SAFE)

            yield Route("/" if path.name == "index.html" else f"/{path.name}", answer)


def app_of(service: Service, cors: list[str] | None = None) -> Starlette:
    """The application; `cors`: origins whose pages may ask."""
    guards = [Middleware(Guard, service=service)]
    if cors:
        headers = ["authorization", "content-type"]
        allowed = Middleware(
            CORSMiddleware, allow_origins=cors, allow_methods=["GET", "POST"], allow_headers=headers
        )  # fmt: skip
        guards.insert(0, allowed)
    return Starlette(
        routes=[
            *_files(),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/health", service.health),
            Route("/metrics", service.prometheus),
        ],
        middleware=guards,
        exception_handlers={
            ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _failed,
        },
    )  # fmt: skip


class Lines(logging.Formatter):
    """A line of JSON for each thing that happened."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        told = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        told |= getattr(record, "told", {})
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)
