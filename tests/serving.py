"""A server of a tiny model in a thread of this process, and a client without any library."""

import contextlib
import functools
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from oracles import tiny
from special import KINDS

from hybrid import HybridForCausalLM
from hybrid.sampling.serve.app import Service
from hybrid.sampling.serve.server import Server, bound, server_of, service_of

NAME = "tiny"
JSON = {"content-type": "application/json"}


@functools.cache
def tokenizer_of(kind: str = "ours") -> Any:
    return KINDS[kind]()


@functools.cache
def model_of(kind: str = "ours", clean: str = "causal") -> HybridForCausalLM:
    tokenizer = tokenizer_of(kind)
    return tiny(
        3, peaked=0.3, clean_attention=clean, vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        initializer_range=0.6,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """In OpenAI's shape."""
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"} and found["message"]
        return found


@dataclass(frozen=True, kw_only=True)
class Place:
    """A server that runs."""

    port: int
    service: Service
    server: Server

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, None, headers)

    def send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Reply(
                status=answer.status, headers={k.lower(): v for k, v in answer.getheaders()}, body=answer.read()
            )
        finally:
            connection.close()

    def post(self, path: str = "/v1/completions", raw: bytes | None = None, **fields: Any) -> Reply:
        body = json.dumps({"model": NAME, **fields}).encode() if raw is None else raw
        return self.send("POST", path, body, JSON)

    def complete(self, prompt: Any, **fields: Any) -> Any:
        """A good answer."""
        reply = self.post(prompt=prompt, **fields)
        assert reply.status == 200, reply.body
        return reply.json

    def events(self, path: str = "/v1/completions", **fields: Any) -> Iterator[tuple[str, Any]]:
        """Of a stream: kind and data, until [DONE]."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", path, json.dumps({"model": NAME, "stream": True, **fields}), JSON)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            kind = "message"
            for line in answer:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    if value == "[DONE]":
                        return
                    yield kind, json.loads(value)
                    kind = "message"
        finally:
            connection.close()

    def streamed(self, path: str = "/v1/completions", **fields: Any) -> list[Any]:
        return [data for kind, data in self.events(path, **fields) if kind == "message"]

    def until(self, condition: Any, seconds: float = 20.0) -> None:
        """Wait for something to be so."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not come about"
            time.sleep(0.01)

    @property
    def empty(self) -> bool:
        """Whether nothing is decoded, and nothing waits."""
        return self.service.decoder.busy == 0 and self.service.decoder.session.active == 0


@contextlib.contextmanager
def serving(
    model: HybridForCausalLM, tokenizer: Any, *, grace: float = 5.0, cors: list[str] | None = None, port: int = 0,
    **options: Any,
) -> Iterator[Place]:  # fmt: skip
    service = service_of(model, tokenizer, name=NAME, **{"slots": 4, **options})
    socket = bound("127.0.0.1", port)
    server = server_of(service, grace=grace, cors=cors)
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    place = Place(port=socket.getsockname()[1], service=service, server=server)
    place.until(lambda: server.started)
    try:
        yield place
    finally:
        server.should_exit = True
        thread.join(30)
        socket.close()
        assert not thread.is_alive()
