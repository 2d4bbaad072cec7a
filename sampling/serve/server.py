"""The process and its door: a socket, uvicorn, signals, clients that send slowly, and who may ask at all."""

import asyncio
import copy
import functools
import hmac
import json
import logging
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hybrid import HybridForCausalLM
from hybrid.law import Law
from hybrid.sampling.request import Done, options_of
from hybrid.sampling.serve.app import Service, app_of, ending, said
from hybrid.sampling.serve.asks import Asks, Limits, canvas_of
from hybrid.sampling.serve.decoder import Decoder
from hybrid.sampling.serve.grammar import Grammars
from hybrid.sampling.serve.jobs import Job
from hybrid.sampling.serve.metrics import Metrics
from hybrid.sampling.serve.protocol import ApiError
from hybrid.sampling.session import Session

LOG = logging.getLogger("hybrid.serve")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
KNOWN = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


def service_of(
    model: HybridForCausalLM, tokenizer: Any, *, name: str, slots: int = 16, mode: str | None = None,
    adapter: Path | str | None = None, limits: dict[str, Any] | None = None, api_key: str | None = None,
    log_text: bool = False, loopback: bool = True, finished: Callable[[Job, Done], object] = lambda job, done: None,
) -> Service:  # fmt: skip
    """All parts of a server but its socket.

    Args:
        tokenizer: of the model; None: it reads and writes token ids.
        mode: of requests that name none; None: what the model's generation_config.json says.
        limits: fields of `Limits` that are not to be as they are by default.
        finished: is told of each text that was decoded to its end, in the decoding thread.
    """
    context = model.config.max_position_embeddings
    own = {"prompt": context, "max_tokens": min(context, 4096), "canvas": canvas_of(model, slots), **(limits or {})}
    bounds, metrics = Limits(**own), Metrics()
    options: dict[str, Any] = {} if mode is None else {"mode": mode}

    own_adapter = None if adapter is None else str(adapter)
    session: Any = functools.partial(Session, model, slots=slots, draft_adapter=own_adapter, **options)
    decoder = Decoder(session, metrics, max_queue=bounds.max_queue, finished=finished)
    ends = options_of(model, {}, {"mode": Law.of(model.config).modes[0]})[1].eos
    grammars = Grammars(copy.deepcopy(tokenizer), model.config.vocab_size, frozenset(ends))
    asks = Asks(model, tokenizer, copy.deepcopy(tokenizer), decoder, bounds)
    return Service(
        name=name, asks=asks, decoder=decoder, grammars=grammars, metrics=metrics, api_key=api_key,
        log_text=log_text, loopback=loopback,
    )  # fmt: skip


def server_of(service: Service, *, grace: float = 30.0, cors: list[str] | None = None) -> "Server":
    """What serves, once `run` is called; `cors`: origins whose pages may ask."""
    AppStatus.disable_automatic_graceful_drain()  # streams end when their texts do
    limits, guards = service.limits, [Middleware(Guard, service=service)]
    if cors:
        methods, headers = ["GET", "POST"], ["authorization", "content-type"]
        allowed = Middleware(CORSMiddleware, allow_origins=cors, allow_methods=methods, allow_headers=headers)
        guards.insert(0, allowed)
    config = uvicorn.Config(
        app_of(service, guards), http=type("Protocol", (Impatient,), {"patience": limits.sending}), ws="none",
        log_config=None, access_log=False, server_header=False, limit_concurrency=limits.connections,
        timeout_keep_alive=30, timeout_graceful_shutdown=int(grace) + 10, h11_max_incomplete_event_size=64 * 1024,
        lifespan="off",
    )  # fmt: skip
    return Server(config, service, grace)


class Server(uvicorn.Server):
    """Ends as those want who wait: what is under way is finished, for `grace` seconds at most, and then told off."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self.service, self.grace = service, grace

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        service = self.service
        service.decoder.start()
        try:
            super().run(sockets)
        finally:
            service.decoder.stop(ending())
            for pool in (service.encoding, service.building):
                pool.shutdown(wait=False, cancel_futures=True)
            service.grammars.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.closing = True
        self.force_exit = self.should_exit  # the second time, whichever signal it is
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.closing = True
        patience = asyncio.create_task(self._lose_patience())
        try:
            await super().shutdown(sockets)
        finally:
            patience.cancel()
            self._captured_signals.clear()  # what was asked for is done

    async def _lose_patience(self) -> None:
        await asyncio.sleep(self.grace)
        await asyncio.to_thread(self.service.decoder.stop, ending())


# --- Who may ask ----------------------------------------------------------------------------------


def bound(host: str, port: int) -> socket.socket:
    """A socket that nobody else has.

    Raises:
        ValueError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {error}. Another server may be running: try --port.") from error


def is_loopback(host: str) -> bool:
    return host in LOOPBACK or host.startswith("127.")


class Impatient(H11Protocol):
    """Closes connections whose requests do not come."""

    patience = 20.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.patience, transport.close)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self._timer is None and (before is None or before.response_complete):
            self._timer = self.loop.call_later(self.patience, self.transport.close)
        super().data_received(data)
        if self.cycle is not before:
            self._calm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def _calm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Guard:
    """Before everything: who may ask; behind it: what is counted and told of each answer."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, path, status = time.monotonic(), scope["path"], 499  # unless something is sent, nobody is there

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._refused(Headers(scope=scope), scope)
            await (self.app if refused is None else said(refused))(scope, receive, watched)
        except Exception:
            if status == 499:
                status = 500  # as it is answered outside of this, where errors are met that nobody expected
            raise
        finally:
            self.service.metrics.requests.labels(path if path in KNOWN else "other", str(status)).inc()
            seconds = round(time.monotonic() - begun, 4)
            told = {"method": scope["method"], "path": path[:200], "status": status, "seconds": seconds}
            LOG.log(logging.DEBUG if path in ("/health", "/metrics") else logging.INFO, "answer", extra={"told": told})

    def _refused(self, headers: Headers, scope: Scope) -> ApiError | None:
        # A page of somebody else's whose name was made to lead here would name itself.
        if self.service.loopback and _host(headers.get("host", "")) not in LOOPBACK:
            return ApiError(403, "host: this server answers on this machine alone (localhost).")
        guarded = scope["path"].startswith("/v1") or scope["path"] == "/metrics"
        if self.service.api_key is not None and guarded and scope["method"] != "OPTIONS":
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.service.api_key.encode())
            if kind.lower() != "bearer" or not right:
                how = "Send the server's key: Authorization: Bearer KEY."
                return ApiError(401, how, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return None


def _host(given: str) -> str | None:
    """The name in a Host header; None: it is none."""
    try:
        return None if "@" in given else urlsplit(f"//{given}").hostname
    except ValueError:
        return None


# --- The log --------------------------------------------------------------------------------------


class Lines(logging.Handler):
    """Writes a line of JSON for each thing that happened to what is the error stream at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        told = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        told |= getattr(record, "told", {})
        try:
            if record.exc_info:
                told["traceback"] = logging.Formatter().formatException(record.exc_info)
            print(json.dumps(told, ensure_ascii=False, default=str), file=sys.stderr, flush=True)
        except Exception:  # whoever reads the log may be gone, and serving goes on
            self.handleError(record)


def log_to_stderr() -> None:
    """A line of JSON for each answer."""
    for name, level in (("hybrid.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Lines()], False
        logger.setLevel(level)
