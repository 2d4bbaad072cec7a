"""Who may ask, how much, and what becomes of the others when something goes wrong."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import JSON, NAME, Place, model_of, serving, tokenizer_of
from storm import good_requests, hostile_bodies, post, storm

from hybrid.sampling import Session

LONG: dict[str, Any] = {"prompt": "one", "max_tokens": 200, "logit_bias": {"1": -100}}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": NAME, **fields}).encode()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    limits = {"sending": 1.0, "body": 50_000, "canvas": 64, "prompt": 120, "max_tokens": 200, "n": 4, "max_queue": 8}
    with serving(model_of(), tokenizer_of(), slots=2, limits=limits) as found:
        yield found


@contextlib.contextmanager
def slowed(seconds: float = 0.02) -> Iterator[None]:
    """Every forward takes its time."""
    plain = Session.step

    def step(self: Session) -> Any:
        time.sleep(seconds)
        return plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "step", step)
        yield


def test_limits(place: Place) -> None:
    for fields, said in (
        ({"prompt": "one", "n": 5}, "n is 5"),
        ({"prompt": "one", "max_tokens": 201}, "at most 200"),
        ({"prompt": "one", "max_tokens": 65, "hybrid": {"mode": "diffusion"}}, "at most 64"),
        ({"prompt": "one", "suffix": "a", "max_tokens": 65}, "65"),
        ({"prompt": "x" * 500}, "at most 120"),
        ({"prompt": [5] * 119, "max_tokens": 150}, "room for"),
        ({"prompt": "one", "max_tokens": 2, "stop": None, "hybrid": {"mode": None, "drafts": None}}, None),
        ({"prompt": "one", "max_tokens": 4, "hybrid": {"mode": "block", "block_size": 250}}, None),
        ({"prompt": "one", "hybrid": {"mode": "speculative", "fused": True, "block_size": 16}}, "at most 256"),
        ({"prompt": "one", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "one", "stop": ["a" * 300]}, "stop"),
        ({"prompt": "one", "logit_bias": {"100000": 1}}, "logit_bias"),
        ({"prompt": "one", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": ["one"] * 11}, "at most 10"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "one", "max_tokens": 0}, "max_tokens"),
        ({"prompt": [3, 9999]}, "vocabulary"),
    ):
        reply = place.post(**fields)
        if said is None:
            assert reply.status == 200
        else:
            assert reply.status == 400 and said in reply.error["message"], reply.body
    assert place.post(raw=body(prompt="x" * 60_000)).status == 413
    missing = place.post(raw=json.dumps({"model": "gpt", "prompt": "a"}).encode())
    assert missing.status == 404 and missing.error["code"] == "model_not_found"
    assert place.get("/v1/completions").status == 405 and place.get("/../../etc/passwd").status == 404
    # Every choice forbidden is the request's own doing.
    nothing = place.post(prompt="one", temperature=1e-320)
    assert nothing.status == 400 and "temperature" in nothing.error["message"]


def test_what_would_take_long_to_encode_is_refused_before(place: Place) -> None:
    begun, spelled = time.process_time(), tokenizer_of().eos_token
    for text in ("x" * 49_000, spelled * 6000):
        assert place.post(prompt=text).error["code"] == "context_length_exceeded"
        asked = [{"role": "user", "content": text}]
        assert place.post("/v1/chat/completions", messages=asked).error["code"] == "context_length_exceeded"
    for wrong in ([1.5] * 8_000, ["a"] * 8_000, [[1]] * 8_000, [{}] * 8_000):
        reply = place.post(prompt=wrong)
        assert reply.status == 400 and reply.error["param"].startswith("prompt")
    assert place.post(prompt="a", hybrid={"mode": "block", "reveal": "dream", "steps_per_block": 10**6}).status == 400
    assert time.process_time() - begun < 5


def test_what_is_not_supported_is_refused_by_its_name(place: Place) -> None:
    for name, value in (
        ("tools", []), ("best_of", 2), ("top_k", 3), ("nonsense", 1), ("functions", []), ("store", False),
    ):  # fmt: skip
        reply = place.post(prompt="a", **{name: value})
        assert reply.status == 400 and name in reply.error["message"] and reply.error["param"] == name
    for message in ({"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "image_url"}]}):
        reply = place.post("/v1/chat/completions", messages=[message])
        assert reply.status == 400 and reply.error["param"].startswith("messages")
    for fields in ({"stream_options": {"include_usage": True}}, {"hybrid": {"drafts": True}}):
        assert "stream=true" in place.post(prompt="a", **fields).error["message"]
    asked = [{"role": "user", "content": "a"}]
    assert place.post("/v1/chat/completions", messages=asked, top_logprobs=2).status == 400


def test_other_peoples_pages_may_not_ask(place: Place) -> None:
    """A page of another origin can send text without asking, and its name can be made to lead here."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = place.send("POST", "/v1/completions", body(prompt="a"), {"content-type": kind})
        assert reply.status == 415 and "access-control-allow-origin" not in reply.headers
    evil = ("evil.example", "evil.example:80", "localhost.evil.example", "localhost@evil.example")
    for host in (*evil, "", "[::1", "[x]"):
        assert place.get("/v1/models", Host=host).status == 403
    for host in ("localhost", "localhost:1", "127.0.0.1:80", "[::1]:80"):
        assert place.get("/v1/models", Host=host).status == 200
    preflight = {"Origin": "http://good.example", "Access-Control-Request-Method": "POST"}
    asked = place.send("OPTIONS", "/v1/completions", None, preflight)
    assert asked.status == 405 and "access-control-allow-origin" not in asked.headers
    page = place.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and page.status == 200
    with serving(model_of(), tokenizer_of(), cors=["http://good.example"]) as open_place:
        allowed = open_place.send("OPTIONS", "/v1/completions", None, preflight)
        assert allowed.headers["access-control-allow-origin"] == "http://good.example"
        other = open_place.send("OPTIONS", "/v1/completions", None, preflight | {"Origin": "http://bad.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_key_is_asked_for() -> None:
    with serving(model_of(), tokenizer_of(), api_key="sécret") as place:
        for given in (None, "Bearer wrong", "Bearer ", "Basic sécret", "sécret", "Bearer s", "Bearer sécretx"):
            headers = {} if given is None else {"Authorization": given.encode().decode("latin-1")}
            for path in ("/v1/models", "/metrics"):
                reply = place.send("GET", path, None, headers)
                assert reply.status == 401 and reply.error["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer sécret".encode().decode("latin-1")}
        assert place.send("GET", "/v1/models", None, right).status == 200
        assert place.send("POST", "/v1/completions", body(prompt="a"), JSON | right).status == 200
        assert place.get("/health").status == place.get("/").status == 200


def test_slow_senders_are_cut_off(place: Place) -> None:
    begun = time.monotonic()
    silent = [socket.create_connection(("127.0.0.1", place.port), timeout=20) for _ in range(3)]
    silent[1].sendall(b"POST /v1/completions HT")
    lines = ("POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json", "content-length: 99")
    silent[2].sendall("\r\n".join([*lines, "", '{"model"']).encode())
    assert silent[0].recv(100) == silent[1].recv(100) == b""
    assert b" 408 " in silent[2].recv(1000)
    assert 0.5 < time.monotonic() - begun < 10
    # Between two requests of one connection as well.
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=20)
    connection.request("GET", "/health")
    connection.getresponse().read()
    connection.sock.sendall(b"GET /hea")
    assert connection.sock.recv(100) == b""
    assert place.complete("one", max_tokens=3)


def test_who_leaves_frees_the_place_at_the_next_step(place: Place) -> None:
    with slowed():
        for stream in (False, True):
            connections = [post(place.port, body(**LONG, stream=stream)) for _ in range(4)]
            place.until(lambda: place.service.decoder.session.active == 2 and place.service.decoder.waiting == 2)
            before = place.service.decoder.session.stats.forwards
            for connection in connections:
                connection.close()
            place.until(lambda: place.empty)
            assert place.service.decoder.session.stats.forwards - before < 40  # of 200 and more
    assert place.complete("one", max_tokens=3)


def test_a_full_queue_says_when_to_come_again(place: Place) -> None:
    with slowed():
        connections = [post(place.port, body(**LONG)) for _ in range(10)]
        place.until(lambda: place.service.decoder.busy == 10)
        reply = place.post(prompt="two", max_tokens=2)
        assert reply.status == 429 and 1 <= int(reply.headers["retry-after"]) <= 60
        assert reply.error["code"] == "queue_full" and reply.error["type"] == "rate_limit_error"
        place.until(lambda: "\nhybrid_queue 8.0\n" in place.get("/metrics").body.decode())
        for connection in connections:
            connection.close()
        place.until(lambda: place.empty)


def test_users_take_turns(place: Place) -> None:
    """One who asks for much does not keep the others waiting."""
    ended = list[str]()

    def ask(user: str) -> None:
        place.complete("one", max_tokens=12, user=user)
        ended.append(user)

    with slowed(0.005):
        threads = [threading.Thread(target=ask, args=("many",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        place.until(lambda: place.service.decoder.busy == 8)
        threads.append(threading.Thread(target=ask, args=("one",)))
        threads[-1].start()
        for thread in threads:
            thread.join()
    assert ended.index("one") <= 4


def test_time_is_limited() -> None:
    with serving(model_of(), tokenizer_of(), slots=1, limits={"seconds": 0.5}) as place, slowed(0.02):
        found = dict[str, Any]()
        first = threading.Thread(target=lambda: found.update(first=place.complete(**LONG)))
        first.start()
        place.until(lambda: place.service.decoder.session.active == 1)
        late = place.post(prompt="two", max_tokens=200)
        first.join()
        choice = found["first"]["choices"][0]
        assert choice["finish_reason"] == "length" and choice["hybrid"] == {"ended": "time"}
        assert 0 < found["first"]["usage"]["completion_tokens"] < 200
        assert late.status in (200, 503)  # it got the place in the very moment, or not
        with slowed(0.3):
            others = [threading.Thread(target=lambda: found.update(x=place.post(**LONG))) for _ in range(1)]
            others[0].start()
            place.until(lambda: place.service.decoder.session.active == 1)
            place.service.decoder.session._rows.slots = 0  # nobody else gets in
            waiting = place.post(prompt="two")
            assert waiting.status == 503 and "retry-after" in waiting.headers
            place.service.decoder.session._rows.slots = 1
            others[0].join()


def test_a_failure_is_its_own(place: Place) -> None:
    """Of a text, of a whole forward, and of the thread's own code: the server goes on."""
    right = place.complete("one", max_tokens=8)["choices"][0]["text"]
    plain, left = Session.step, [0]

    def failures() -> int:
        told = re.findall(r'requests_total{.*status="500"} (\d+)', place.get("/metrics").body.decode())
        return sum(map(int, told))

    before = failures()

    def step(self: Session) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("no memory for so much")
        return plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "step", step)
        left[0] = 3
        reply = place.post(prompt="one", max_tokens=8)
        assert reply.status == 500 and "OutOfMemoryError" in reply.error["message"]
        left[0] = 4
        told = [data for _, data in place.events(prompt="one", max_tokens=8)]
        assert "error" in told[-1] and "choices" in told[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.service.metrics, "look", lambda *args: 1 / 0)
        assert place.post(prompt="one", max_tokens=8).status == 500
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.service.asks, "prepare", lambda *args: 1 / 0)
        reply = place.post(prompt="one")
        assert reply.status == 500 and reply.error["type"] == "server_error"
        assert failures() == before + 3
    assert place.complete("one", max_tokens=8)["choices"][0]["text"] == right


def test_what_failed_with_a_forward_takes_nobody_along_who_came_after(place: Place) -> None:
    """A new session counts its texts from the beginning, and those of the old one are taken back after that."""
    plain, cancel, held = Session.step, place.service.decoder.cancel, list[Any]()
    fails = iter([True])

    def step(self: Session) -> Any:
        if next(fails, False):
            raise torch.OutOfMemoryError("no memory for so much")
        return plain(self)

    with slowed(), pytest.MonkeyPatch.context() as patch:
        plain = Session.step
        patch.setattr(Session, "step", step)
        patch.setattr(place.service.decoder, "cancel", held.append)
        assert place.post(prompt="one", max_tokens=8).status == 500
        [failed] = held
        replies = list[Any]()
        thread = threading.Thread(target=lambda: replies.append(place.post(prompt="one", max_tokens=40)))
        thread.start()
        place.until(lambda: place.service.decoder.session.active == 1)
        cancel(failed)
        thread.join(20)
        assert replies and replies[0].status == 200
        for jobs in held[1:]:
            cancel(jobs)


def test_who_is_under_way_ends_before_the_server_does() -> None:
    with serving(model_of(), tokenizer_of()) as place, slowed():
        text = place.complete(**(LONG | {"max_tokens": 40}))["choices"][0]["text"]
        events = place.events(**(LONG | {"max_tokens": 40}))
        parts = [next(events)[1]["choices"][0]["text"]]
        place.server.handle_exit(signal.SIGTERM, None)
        assert place.service.closing
        parts += [data["choices"][0]["text"] for _, data in events]
        assert "".join(parts) == text
    with serving(model_of(), tokenizer_of(), grace=0.3) as place, slowed(0.1):
        events = place.events(**LONG)
        next(events)
        place.server.handle_exit(signal.SIGTERM, None)
        *_, (_, last) = events
        assert last["error"]["code"] == "shutting_down"
    begun = time.monotonic()
    with serving(model_of(), tokenizer_of(), grace=60) as place, slowed(0.1):
        events = place.events(**LONG)
        next(events)
        for _ in range(2):  # the second one waits for nobody
            place.server.handle_exit(signal.SIGTERM, None)
            time.sleep(0.3)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            assert len(list(events)) < 20
    assert time.monotonic() - begun < 10


@pytest.mark.skipif(importlib.util.find_spec("outlines_core") is None, reason="outlines-core is not installed")
def test_a_grammar_that_takes_for_ever_keeps_nobody_else(place: Place) -> None:
    place.service.grammars.seconds = 1.5
    replies = list[Any]()
    hostile = {"type": "regex", "regex": "(a|b)*a(a|b){30}"}
    thread = threading.Thread(target=lambda: replies.append(place.post(prompt="one", response_format=hostile)))
    thread.start()
    place.until(lambda: place.service.to_build == 1)
    place.complete("one", max_tokens=3)
    assert place.service.to_build == 1  # still
    thread.join()
    assert replies[0].status == 400 and "simpler" in replies[0].error["message"]
    begun = time.monotonic()
    assert place.post(prompt="one", response_format=hostile).status == 400 and time.monotonic() - begun < 1
    place.service.grammars.seconds = 60.0
    good = place.complete("one", max_tokens=5, response_format={"type": "regex", "regex": "[0-9]{2}"})
    assert good["choices"][0]["text"].isdigit()


def test_many_at_once_get_what_each_gets_alone() -> None:
    limits = {"canvas": 64, "max_queue": 12}
    with serving(model_of(), tokenizer_of(), slots=6, limits=limits) as place:
        tally = storm(place.port, good_requests(24), hostile_bodies(60), count=110, clients=20, leaving=0.12)
        assert tally.wrong == []
        assert tally.counts["good"] > 50 and tally.counts["left"] > 3 and tally.counts["bad"] > 1
        decoder = place.service.decoder
        place.until(lambda: place.empty and not decoder._waiting and not decoder.session._rows.active)
        assert place.get("/health").json["status"] == "ok"


def test_hostile_bodies_get_their_4xx(place: Place) -> None:
    for raw in hostile_bodies(120, seed=7):
        reply = place.post(raw=raw)
        assert 400 <= reply.status < 500 and reply.error, (reply.status, raw[:300])
    assert place.empty


def test_the_log_has_no_text_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    from hybrid.sampling.serve.server import log_to_stderr

    for asked in (False, True):
        with serving(model_of(), tokenizer_of(), log_text=asked) as place:
            log_to_stderr()
            said = place.complete("a secret", max_tokens=9)["choices"][0]["text"]
            list(place.events(prompt="a secret", max_tokens=9))
            place.post(prompt="a secret", nonsense="a secret")
        lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
        assert ("a secret" in json.dumps(lines)) == asked
        texts = [line for line in lines if line["event"] == "text"]
        assert len(texts) == 2 and all(line["completion_tokens"] <= 9 and line["ended"] for line in texts)
        assert [line.get("text") for line in texts] == 2 * [[said] if asked else None]
        assert [line["status"] for line in lines if line["event"] == "answer"].count(400) == 1


def test_who_reads_the_log_may_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.sampling.serve.server import log_to_stderr

    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        flush = close = lambda self: None

    def step(self: Session) -> Any:
        raise torch.OutOfMemoryError("no memory for so much")

    with serving(model_of(), tokenizer_of()) as place:
        log_to_stderr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", Closed())
            patch.setattr(Session, "step", step)
            assert place.post(prompt="one").status == 500  # the thread that decodes writes to the log, too
        assert place.complete("one", max_tokens=3)


# --- As a process of its own ----------------------------------------------------------------------


@contextlib.contextmanager
def process(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "hybrid", "serve", str(folder), "--port", "0", "--mode", "ar", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=folder
    ) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127.0.0.1:(\d+)/", server.stdout.readline())
            assert found is not None
            port = int(found[1])
            for _ in range(200):
                with contextlib.suppress(OSError):
                    get(port, "/health")
                    break
                time.sleep(0.05)
            yield server, port
        finally:
            server.kill()


def get(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    return connection.getresponse().read()


def resident(pid: int) -> int:
    """kB of memory."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])


@pytest.mark.slow
def test_two_thousand_requests_of_sixty_four_clients(folder: Path) -> None:
    good, bad = good_requests(60), hostile_bodies(500)
    with process(folder, "--slots", "16", "--max-queue", "40", "--max-canvas", "64") as (server, port):
        storm(port, good, bad, count=300, clients=64)  # kernels, caches and pools are made
        before = resident(server.pid)
        tally = storm(port, good, bad, count=2000, clients=64, seed=2)
        assert tally.wrong == []
        for raw in bad:
            connection = post(port, raw)
            assert 400 <= connection.getresponse().status < 500, raw[:300]
            connection.close()
        slow = []
        for _ in range(50):
            slow.append(socket.create_connection(("127.0.0.1", port)))
            slow[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nhost: loc")
        state = json.loads(get(port, "/health"))
        for _ in range(100):
            state = json.loads(get(port, "/health"))
            if not state["active"] and not state["waiting"]:
                break
            time.sleep(0.1)
        assert (state["status"], state["active"], state["waiting"]) == ("ok", 0, 0)
        assert resident(server.pid) < 1.05 * before, (resident(server.pid), before)
        print(tally.counts, before, resident(server.pid))


@pytest.mark.slow
def test_killed_and_started_again(folder: Path) -> None:
    good = good_requests(10)
    gone = pytest.raises((OSError, http.client.HTTPException, ValueError))
    with process(folder) as (server, port), gone:
        connection = post(port, body(**LONG, stream=True))
        answer = connection.getresponse()
        answer.fp.readline()  # type: ignore[union-attr]
        os.kill(server.pid, signal.SIGKILL)
        answer.read()
        assert server.wait(10) == -signal.SIGKILL
        get(port, "/health")
    with process(folder, "--port", str(port)) as (server, port):
        assert storm(port, good, [b"{"], count=20, clients=4, leaving=0).wrong == []
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
