"""The process: a socket, uvicorn, signals, and clients that send slowly."""

import asyncio
import copy
import importlib.util
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus
from uvicorn.protocols.http.h11_impl import H11Protocol

from hybrid import HybridForCausalLM
from hybrid.law import Law
from hybrid.sampling.request import Done, options_of
from hybrid.sampling.serve.app import ENDING, LOOPBACK, Lines, Service, app_of
from hybrid.sampling.serve.asks import Asks
from hybrid.sampling.serve.decoder import Decoder
from hybrid.sampling.serve.grammar import Grammars
from hybrid.sampling.serve.jobs import Job
from hybrid.sampling.serve.limits import Limits, canvas_of
from hybrid.sampling.serve.metrics import Metrics
from hybrid.sampling.serve.protocol import ApiError
from hybrid.sampling.session import Session

LOG = logging.getLogger("hybrid.serve")


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

    def session() -> Session:
        return Session(model, slots=slots, draft_adapter=adapter, **options)  # type: ignore[arg-type]

    decoder = Decoder(session, metrics, max_queue=bounds.max_queue, finished=finished)
    grammars = None
    if tokenizer is not None and importlib.util.find_spec("outlines_core") is not None:
        ends = options_of(model, {}, {"mode": Law.of(model.config).modes[0]})[1].eos
        grammars = Grammars(copy.deepcopy(tokenizer), model.config.vocab_size, frozenset(ends))
    asks = Asks(model, tokenizer, copy.deepcopy(tokenizer), decoder, bounds, grammars)
    return Service(
        name=name, asks=asks, decoder=decoder, metrics=metrics, api_key=api_key, log_text=log_text, loopback=loopback
    )


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
            service.decoder.stop(ApiError(503, ENDING, code="shutting_down"))
            for pool in (service.encoding, service.building):
                pool.shutdown(wait=False, cancel_futures=True)
            if service.asks.grammars is not None:
                service.asks.grammars.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.closing = True
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
        ending = ApiError(503, ENDING, code="shutting_down", headers={"Retry-After": "5"})
        await asyncio.to_thread(self.service.decoder.stop, ending)


class Impatient(H11Protocol):
    """Closes connections whose requests do not come."""

    patience = 20.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self._timer is None and (before is None or before.response_complete):
            self._expect()
        super().data_received(data)
        if self.cycle is not before:
            self._calm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self._timer = self.loop.call_later(self.patience, self.transport.close)

    def _calm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def bound(host: str, port: int) -> socket.socket:
    """A socket that nobody else has.

    Raises:
        ValueError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise ValueError(f"--host {host} --port {port}: {error}. Another server may be running: try --port.") from error
    found.listen(256)
    return found


def is_loopback(host: str) -> bool:
    return host in LOOPBACK or host.startswith("127.")


class StandardError(logging.Handler):
    """Writes to what is the error stream at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """A line of JSON for each answer."""
    handler = StandardError()
    handler.setFormatter(Lines())
    for name in ("hybrid.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "hybrid.serve" else logging.WARNING)


def server_of(service: Service, *, grace: float = 30.0, cors: list[str] | None = None) -> Server:
    """What serves, once `run` is called."""
    AppStatus.disable_automatic_graceful_drain()  # streams end when their texts do
    limits = service.limits
    config = uvicorn.Config(
        app_of(service, cors), http=type("Protocol", (Impatient,), {"patience": limits.sending}), ws="none",
        log_config=None, access_log=False, server_header=False, limit_concurrency=limits.connections,
        timeout_keep_alive=30, timeout_graceful_shutdown=int(grace) + 10, h11_max_incomplete_event_size=64 * 1024,
        lifespan="off",
    )  # fmt: skip
    return Server(config, service, grace)
