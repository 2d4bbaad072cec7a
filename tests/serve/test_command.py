"""`hybrid serve` and `hybrid bench server`, in this process; and what docs/serve.md says to curl."""

import contextlib
import csv
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from serving import NAME, Place, model_of, serving, tokenizer_of
from transformers import AutoTokenizer

import hybrid.sampling.serve.server as module
from hybrid import HybridForCausalLM
from hybrid.commands import main

DOCS = Path(__file__).parents[2] / "docs"


@contextlib.contextmanager
def started(monkeypatch: pytest.MonkeyPatch, *words: str) -> Iterator[Place]:
    """The command's server."""
    servers, plain, there = list[Any](), module.server_of, threading.Event()

    def server_of(service: Any, **options: Any) -> Any:
        servers.append((service, plain(service, **options)))
        there.set()
        return servers[0][1]

    monkeypatch.setattr(module, "server_of", server_of)
    thread = threading.Thread(target=main, args=(["serve", *words, "--port", "0"],))
    thread.start()
    assert there.wait(60)
    service, server = servers[0]
    place = Place(port=0, service=service, server=server)
    place.until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Place(port=port, service=service, server=server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Run:
    def __init__(self) -> None:
        self.logged, self.finished = list[dict[str, Any]](), False

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.finished = True


def test_serves_and_writes_down_what_it_took(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run()
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    monkeypatch.setenv("HYBRID_API_KEY", "secret\n")
    file, words = tmp_path / "speed.csv", ("--mode", "block", "--slots", "2", "--wandb", "served", "--max-tokens", "30")
    cors = "http://a.example, http://b.example"
    with started(monkeypatch, str(folder), *words, "--csv", str(file), "--cors", cors) as place:
        for origin in cors.split(", "):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            reply = place.send("OPTIONS", "/v1/completions", None, asked)
            assert reply.headers["access-control-allow-origin"] == origin
        assert place.post(prompt="one").status == 401
        headers = {"content-type": "application/json", "authorization": "Bearer secret"}
        body = json.dumps({"model": NAME, "prompt": "one", "max_tokens": 9}).encode()
        answer = place.send("POST", "/v1/completions", body, headers).json
        assert answer["usage"]["hybrid"]["mode"] == "block"
        card = place.send("GET", "/v1/models", None, headers).json["data"][0]
        assert (card["hybrid"]["mode"], card["hybrid"]["slots"]) == ("block", 2)
        assert card["hybrid"]["limits"]["max_tokens"] == 30
        place.until(lambda: file.read_text().count("\n") == 2)
    [row] = csv.DictReader(file.open())
    assert row["mode"] == "block" and int(row["output_tokens"]) == answer["usage"]["completion_tokens"]
    assert run.finished and run.logged[0]["generation/output_tokens"] == int(row["output_tokens"])
    said = capsys.readouterr().out
    assert NAME in said and "http://127.0.0.1:" in said


def test_a_model_without_a_tokenizer_is_served_by_ids(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if "token" not in file.name and "template" not in file.name:
            shutil.copy(file, bare)
    with started(monkeypatch, str(bare), "--name", NAME) as place:
        assert len(place.complete([5, 6], max_tokens=4)["choices"][0]["token_ids"]) == 4
    assert "token ids" in capsys.readouterr().out


def test_what_cannot_be_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = module.bound("127.0.0.1", 0)
    port = str(taken.getsockname()[1])
    for words, said in (
        ((str(folder), "--port", port), "--port"),
        ((str(folder), "--port", "99999"), "--port"),
        ((str(folder), "--slots", "0"), "--slots"),
        ((str(folder), "--max-queue", "-1"), "--max-queue"),
        ((str(folder), "--api-key", " "), "--api-key"),
        (("./nothing",), "nothing"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["serve", *words, *(() if "--port" in words else ("--port", "0"))])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    taken.close()
    monkeypatch.setitem(sys.modules, "hybrid.sampling.serve.server", None)
    with pytest.raises(SystemExit):
        main(["serve", str(folder)])
    assert "hybrid-lm[serve]" in capsys.readouterr().err


def test_a_server_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model_of(), tokenizer_of(), api_key="secret") as place:
        address = f"http://127.0.0.1:{place.port}/v1"
        words = ["bench", "server", address, "--clients", "1,3", "--answers", "4", "--new-tokens", "6"]
        for template in (tokenizer_of().chat_template, None):
            monkeypatch.setattr(place.service.asks.tokenizer, "chat_template", template)
            main([*words, "--api-key", "secret", "--long-prompts", "20"])
            table = capsys.readouterr().out
            assert "first token" in table and NAME in table and len(re.findall(r"│ +[13] │ +4 │", table)) == 2
        with pytest.raises(SystemExit):
            main(words)
        assert "401" in capsys.readouterr().err
    for wrong in (["ftp://x"], [address, "--clients", "many"]):
        with pytest.raises(SystemExit):
            main(["bench", "server", *wrong])


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_what_the_page_of_the_documentation_says_to_curl() -> None:
    text = (DOCS / "serve.md").read_text()
    blocks = [block for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) if block.startswith("curl")]
    assert blocks
    model = HybridForCausalLM.from_pretrained("hybrid-stdlib").eval()
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    with serving(model, tokenizer) as place:
        place.service.name = "hybrid-stdlib"
        for block in blocks:
            command = block.replace("127.0.0.1:8000", f"127.0.0.1:{place.port}")
            said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
            answers = said.replace("}{", "}\n{").splitlines()
            assert len(answers) == block.count("curl ")
            assert all(json.loads(answer)["usage"]["completion_tokens"] > 0 for answer in answers)
