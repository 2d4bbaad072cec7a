"""Many clients at once: good requests whose answers are known, hostile ones, and such as leave."""

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving import JSON, NAME, model_of, tokenizer_of

from hybrid.sampling import Request, decode_all
from hybrid.texts import decode, encode

MODES = ("ar", "block", "diffusion", "speculative")
TEXTS = ("one two", "def add(a, b):\n", "naïve café ☕", "three <|mask|> four", "x" * 90, " a  b")


@dataclass(frozen=True, kw_only=True)
class Good:
    """A request, and its answer when nobody else is there."""

    fields: dict[str, Any]
    text: str


def good_requests(count: int, seed: int = 0) -> list[Good]:
    source, found = random.Random(seed), []
    for number in range(count):
        mode, prompt = source.choice(MODES), source.choice(TEXTS)
        options: dict[str, Any] = {"max_tokens": source.choice((1, 3, 8, 17, 30))}
        own: dict[str, Any] = {"mode": mode}
        if source.random() < 0.5:
            options |= {"temperature": source.choice((0.7, 1.2)), "seed": number}
        if mode == "block":
            own |= source.choice(({}, {"confidence_threshold": 0.4}, {"block_size": 3}, {"reveal": "entropy"}))
        if mode == "speculative":
            own |= source.choice(({}, {"fused": True, "block_size": 4}, {"block_size": 3}))
        given = {"max_new_tokens": options["max_tokens"], **own}
        given |= {"temperature": options["temperature"]} if "seed" in options else {}
        ids = encode(tokenizer_of(), prompt)
        done = decode_all(model_of(), [Request(ids, seed=options.get("seed"), **given)], budget=20_000)[0][0]
        text = decode(tokenizer_of(), done.tokens, after=ids)
        found.append(Good(fields={"prompt": prompt, "hybrid": own, **options}, text=text))
    return found


def hostile_bodies(count: int, seed: int = 0) -> list[bytes]:
    """Each must be answered with a 4xx."""
    source = random.Random(seed)
    junk: list[Any] = [
        None, True, -1, 0.5, 10**30, -(10**30), 1e308, "", "x", [], {}, [[]], [None], {"a": 1}, "\x00", [1, "a"], [-1],
        [10**12], [["a"]], {"mode": "ar"}, "9" * 5000,
    ]  # fmt: skip
    # What each field may be of the junk, so that it is left out of it.
    fine: dict[str, tuple[Any, ...]] = {
        "prompt": ("", "x", "\x00", "9" * 5000), "max_tokens": (None,), "n": (None,), "temperature": (None, 0.5, True),
        "top_p": (None, 0.5), "seed": (None, -1), "stop": (None, [], "x", "\x00"), "logit_bias": (None, {}),
        "hybrid": (None, {}, {"mode": "ar"}), "stream": (None, True), "response_format": (None,),
        "logprobs": (None,), "suffix": (None, "", "x", "\x00"), "presence_penalty": (None, 0.5, -1),
        "user": (None, "", "x", "\x00"), "echo": (None, True), "tools": (None,), "stream_options": (None,),
    }  # fmt: skip
    base = json.dumps({"model": NAME, "prompt": "one", "max_tokens": 4})
    found = []
    while len(found) < count:
        kind = source.randrange(10)
        if kind < 6:
            field_ = source.choice(list(fine))
            value = source.choice(junk)
            if any(value is ok or (value == ok and type(value) is type(ok)) for ok in fine[field_]):
                continue
            body = json.dumps({"model": NAME, "prompt": "one", "max_tokens": 4, field_: value}).encode()
        elif kind == 6:
            depth = source.choice((300, 5_000, 100_000))
            opens = source.choice((b"[", b'{"a":'))
            body = source.choice((b"", b'{"model":"tiny","prompt":')) + opens * depth
        elif kind == 7:
            cut = source.randrange(len(base) - 1)
            body = base[:cut].encode()
        elif kind == 8:
            wrong = (b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\\ud800", b"\\x41")
            body = base.replace("one", "on\N{PILE OF POO}").encode().replace(b"on", b"on" + source.choice(wrong), 1)
            body = body.replace(b"\\ud83d", b"\\ud83d\\ud83d")
        else:
            own = source.choice((
                {"mode": "psychic"}, {"block_size": 10**9, "mode": "block"}, {"scheme": "x"}, {"watchers": []},
                {"confidence_threshold": 7, "mode": "block"}, {"reveal": "../../etc/passwd", "mode": "block"},
                {"draft_adapter": "/etc"}, {"fused": True, "block_size": 200, "mode": "speculative"},
                {"generation_config": {}}, {"mode": "ar", "block_size": 3}, {"cache": "dual"}, {"min_p": 9},
            ))  # fmt: skip
            body = json.dumps({"model": NAME, "prompt": "one", "hybrid": own}).encode()
        found.append(body)
    return found


@dataclass
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def note(self, what: str, wrong: str | None = None) -> None:
        with self.lock:
            self.counts[what] += 1
            if wrong is not None:
                self.wrong.append(f"{what}: {wrong}"[:600])


def storm(
    port: int, good: Sequence[Good], bad: Sequence[bytes], *, count: int, clients: int, leaving: float = 0.1,
    hostile: float = 0.05, seed: int = 1,
) -> Tally:  # fmt: skip
    """`count` requests, good ones in all modes, whole and streamed; a share of the clients leaves in the middle."""
    tally, jobs = Tally(), list(range(count))

    def client(number: int) -> None:
        source = random.Random(seed * 1000 + number)
        while True:
            with tally.lock:
                if not jobs:
                    return
                jobs.pop()
            try:
                if source.random() < hostile:
                    _bad(port, source.choice(bad), tally)
                else:
                    _good(port, source.choice(good), source.random() < 0.5, source.random() < leaving, source, tally)
            except Exception as error:
                tally.note("failed", repr(error))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(900)
        if thread.is_alive():
            tally.note("hangs", "a client waits for ever")
    return tally


def post(port: int, body: bytes, timeout: float = 120.0) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    connection.request("POST", "/v1/completions", body, JSON)
    return connection


def _bad(port: int, body: bytes, tally: Tally) -> None:
    connection = post(port, body)
    answer = connection.getresponse()
    said = answer.read()
    good = 400 <= answer.status < 500 and "message" in json.loads(said)["error"]
    tally.note("bad", None if good else f"{answer.status} for {body[:200]!r}")
    connection.close()


def _good(port: int, ask: Good, stream: bool, leaves: bool, source: random.Random, tally: Tally) -> None:
    body = json.dumps({"model": NAME, "stream": stream, **ask.fields}).encode()
    while True:
        connection = post(port, body)
        if leaves and not stream:
            time.sleep(source.random() / 20)
            connection.close()
            return tally.note("left")
        answer = connection.getresponse()
        if answer.status == 429:
            tally.note("full", None if int(answer.headers["Retry-After"]) >= 1 else "Retry-After")
            connection.close()
            time.sleep(0.05 + source.random() / 10)
            continue
        break
    if answer.status != 200:
        return tally.note("good", f"{answer.status} {answer.read()[:300]!r} for {ask.fields}")
    if leaves:
        answer.fp.readline()  # type: ignore[union-attr]
        sock = connection.sock
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        return tally.note("left")
    if stream:
        parts = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
        if parts[-1:] != ["[DONE]"]:
            return tally.note("good", f"the stream ends with {parts[-1:]}")
        text = "".join(json.loads(part)["choices"][0]["text"] for part in parts[:-1])
    else:
        text = json.loads(answer.read())["choices"][0]["text"]
    tally.note("good", None if text == ask.text else f"{text!r} and not {ask.text!r} for {ask.fields}")
    connection.close()
