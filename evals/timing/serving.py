"""The speed of a server, whoever made it: several clients of OpenAI's protocol at once, each waiting for its answer
before it asks again."""

import http.client
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

SUBJECTS = ("a river", "the sea", "two friends", "an old clock", "winter", "a letter", "the moon", "bread")
FILLER = "It was said again and again, and each time a little otherwise. "  # of long prompts


@dataclass
class Served:
    """What clients saw.

    Attributes:
        seconds: from the first request to the end of the last answer.
        tokens: of all answers.
        first: seconds to the first piece of each answer.
        gaps: seconds between two pieces of one answer.
        total: seconds of each answer.
    """

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens a second, of all clients together."""
        return self.tokens / self.seconds


def percentile(values: Sequence[float], share: float) -> float | None:
    """None where there are no values."""
    return float(np.quantile(values, share)) if values else None


class Client:
    """One connection at a time to one server."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises ValueError for what is no address."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        host = parts.hostname
        if parts.scheme not in ("http", "https") or host is None:
            raise ValueError(f"url is {url!r}; give an address such as http://127.0.0.1:8000.")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.connect = lambda: kind(host, parts.port, timeout=600)
        self.base = parts.path.rstrip("/").removesuffix("/v1")
        self.headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}

    @contextmanager
    def _asked(self, method: str, path: str, body: str | None = None) -> Iterator[http.client.HTTPResponse]:
        with closing(self.connect()) as connection:
            connection.request(method, f"{self.base}/v1/{path}", body, self.headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"server: it answers {answer.status}: {answer.read()[:300].decode(errors='replace')}")
            yield answer

    def model(self) -> str:
        """The first that the server has."""
        with self._asked("GET", "models") as answer:
            return str(json.load(answer)["data"][0]["id"])

    def ask(self, fields: dict[str, Any]) -> tuple[int, list[float]]:
        """The tokens of a streamed chat or, with "prompt" among its fields, text; and the seconds at which pieces came.

        Raises:
            ValueError: the server refuses, or fails.
        """
        begun, came, tokens = time.perf_counter(), list[float](), None
        path = "completions" if "prompt" in fields else "chat/completions"
        with self._asked("POST", path, json.dumps(fields)) as answer:
            for line in answer:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise ValueError(f"server: {chunk['error']}")
                if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in chunk["choices"]):
                    came.append(time.perf_counter() - begun)
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
        return (len(came) if tokens is None else tokens), came


def load(
    url: str, *, model: str, clients: int, count: int, new_tokens: int, long: int = 0, key: str | None = None,
    chat: bool = True, options: dict[str, Any] | None = None,
) -> Served:  # fmt: skip
    """`count` answers of up to `new_tokens`, asked for by `clients` at once.

    Args:
        long: one more client asks meanwhile, again and again, with prompts of about so many tokens; what it sees is
            not counted.
        chat: they are chats; else texts to be continued.
        options: further fields of each request.

    Raises:
        ValueError: the server refuses, or fails.
    """
    client, found, over = Client(url, key), Served(), threading.Event()
    common = {
        "model": model, "temperature": 0, "max_tokens": new_tokens, "stream": True,
        "stream_options": {"include_usage": True}, **(options or {}),
    }  # fmt: skip

    def said(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}

    def ask(number: int) -> tuple[int, list[float], float]:
        text = f"Tell me a story about {SUBJECTS[number % len(SUBJECTS)]}, number {number}."
        begun = time.perf_counter()
        tokens, came = client.ask({**common, **said(text)})
        return tokens, came, time.perf_counter() - begun

    def ask_at_length() -> None:
        for number in itertools.takewhile(lambda _: not over.is_set(), itertools.count()):
            text = f"{number} {FILLER * (long // 13)} Sum it up."
            client.ask({**common, "max_tokens": 1, **said(text)})

    with ThreadPoolExecutor(clients) as pool, ThreadPoolExecutor(1) as another:
        beside = [another.submit(ask_at_length)] if long else []
        begun = time.perf_counter()
        try:
            for tokens, came, seconds in pool.map(ask, range(count)):
                found.tokens += tokens
                found.total.append(seconds)
                found.first += came[:1]
                found.gaps += [b - a for a, b in itertools.pairwise(came)]
            found.seconds = time.perf_counter() - begun
        finally:
            over.set()
        for each in beside:
            each.result()
    return found
