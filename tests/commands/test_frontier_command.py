"""`hybrid eval frontier` and `compare`, in process and killed: what they leave, take up again and complain of."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import tiny

import hybrid.evals.passes.runs
from hybrid.commands import main
from hybrid.evals.passes.outputs import decode
from hybrid.evals.results import load_results, untimed
from hybrid.training.callbacks import save_folder
from hybrid.training.text.tokenizing import train_bpe

SOURCE = "def f(x):\n    return x + 1\n"
SWEEP = """\
settings:
  - mode: ar
  - {mode: speculative, block_size: 3}
  - {mode: block, block_size: 3, confidence_threshold: 0.5}
  - {mode: diffusion, confidence_threshold: 0.5}
"""
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
FILES = {"report.html", "frontier.png", "frontier.svg", "frontier.csv", "results.json", "journal.jsonl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frontier")
    bpe = train_bpe([SOURCE * 40], 280)
    bpe.chat_template = CHAT
    for name, seed, fields in (
        ("model", 1, {}), ("other", 2, {}), ("masked", 1, {"clean_attention": "full"}),
        ("pure", 1, {"mask_token_id": None}), ("grid", 1, {"clean_attention": "block", "block_size": 4}),
    ):  # fmt: skip
        given = {
            "vocab_size": len(bpe), "mask_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 2,
            "initializer_range": 0.2,
        }  # fmt: skip
        save_folder(tiny(seed, dtype=torch.float32, **{**given, **fields}), bpe, root / name)
    lines: list[dict[str, Any]] = [{"prompt": "def f" + " x" * i, "target": "(x):\n"} for i in range(11)]
    lines.append({"messages": [{"role": "user", "content": "x + 1"}], "target": "2"})
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    for name, bad in (
        ("lacks", '{"target": "x"}'), ("targetless", '{"prompt": "x"}'), ("list", "[1]"), ("broken", '{"prompt"'),
        ("none", "\n"), ("number", '{"prompt": 3, "target": "x"}'), ("both", '{"prompt": "x", "text": "x"}'),
        ("roles", '{"messages": [{"role": "user"}]}'),
        ("long", json.dumps({"prompt": "x\n" * 200, "target": "x"})),
    ):  # fmt: skip
        (root / f"{name}.jsonl").write_text(f'{{"prompt": "fine", "target": "x"}}\n{bad}\n' if name != "none" else bad)
    (root / "sweep.yaml").write_text(SWEEP)
    return root


Run = Callable[..., str]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def command(out: Path, *words: object, model: str = "model") -> str:
        given = [
            "--model", folder / model, "--prompts", folder / "prompts.jsonl", "--sweep", folder / "sweep.yaml",
            "--out", out, "--max-new-tokens", 5, "--repeats", 1, "--batch-size", 4,
        ]  # fmt: skip
        main(["eval", "frontier", *map(str, given), *map(str, words)])
        return capsys.readouterr().out

    return command


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The settings that were really decoded, in order."""
    seen: list[str] = []

    def noted(model: Any, tokenizer: Any, prompts: Any, setting: Any, **more: Any) -> Any:
        seen.append(setting.name)
        return decode(model, tokenizer, prompts, setting, **more)

    monkeypatch.setattr(hybrid.evals.passes.runs, "decode", noted)
    yield seen


def test_it_leaves_everything_and_a_second_run_measures_nothing(
    folder: Path, run: Run, passes: list[str], tmp_path: Path
) -> None:
    said = run(tmp_path, "--likelihood", "--quality", "edit_similarity,parses", "--latency-batch-sizes", "[1,3]")
    results = load_results(tmp_path / "results.json").plain()
    (act,) = results["acts"]
    assert [row["mode"] for row in act["rows"]] == ["ar", "speculative", "block", "diffusion"]
    assert all(row["prompts"] == 12 and row["tokens_out"] == 60 for row in act["rows"])
    assert all(row["agreement"] == 1.0 for row in act["rows"] if row["lossless"])
    assert all([c["batch_size"] for c in row["timing"]["latency"]] == [1, 3] for row in act["rows"])
    assert all(row["also"].keys() == {"parses"} for row in act["rows"])
    assert {entry["law"] for entry in act["likelihood"]} == {"ar", "block", "masked"}
    traced = [panel["name"].split(":")[0] for panel in act["trace"]["panels"]]
    assert traced == ["ar", "speculative", "block", "diffusion"]
    assert act["samples"][0]["prompt"] == "def f" and act["prompts"]["count"] == 12
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert str(tmp_path / "report.html") in said
    # The reference; then each setting warmed up, timed, and in calls of 8 prompts, one and three at a time.
    assert len(passes) == 1 + 4 * (1 + 1 + 8 + 2)

    passes.clear()
    run(tmp_path, "--likelihood", "--quality", "edit_similarity,parses", "--latency-batch-sizes", "[1,3]")
    assert passes == []
    again = load_results(tmp_path / "results.json").plain()
    assert again["acts"] == results["acts"]



@pytest.mark.slow
def test_what_the_journal_gives_and_what_it_does_not(run: Run, passes: list[str], tmp_path: Path) -> None:
    """One more setting: only that is new. Another seed, or a fresh start: everything is."""
    run(tmp_path, "--latency-batch-sizes", "[1,3]")
    passes.clear()
    (tmp_path / "more.yaml").write_text(SWEEP + "  - {mode: block, block_size: 2}\n")
    run(tmp_path, "--sweep", tmp_path / "more.yaml", "--latency-batch-sizes", "[1,3]")
    assert set(passes) == {"block 2"}
    passes.clear()
    run(tmp_path, "--seed", 1, "--latency-batch-sizes", "[]")
    assert len(passes) == 1 + 4 * 2
    passes.clear()
    run(tmp_path, "--fresh", "--latency-batch-sizes", "[]")
    assert len(passes) == 1 + 4 * 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "modes"), [
    ("masked", {"block", "diffusion"}), ("pure", {"ar"})])  # fmt: skip
def test_the_default_sweep_leaves_out_what_a_model_lacks(
    name: str, modes: set[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", folder / name, "--prompts", folder / "prompts.jsonl", "--out", tmp_path, "--count", 2)
    quick = ("--max-new-tokens", "4", "--repeats", "1", "--latency-batch-sizes", "[]")
    main(["eval", "frontier", *map(str, words), *quick])
    (act,) = load_results(tmp_path / "results.json").plain()["acts"]
    assert {row["mode"] for row in act["rows"]} == modes
    assert any("left out" in note for note in act["notes"])
    assert "left out" in capsys.readouterr().out


@pytest.mark.slow
def test_a_rerun_is_the_same_but_for_times(run: Run, tmp_path: Path) -> None:
    options = ("--latency-batch-sizes", "[2]")
    run(tmp_path / "a", *options)
    run(tmp_path / "b", *options, "--batch-size", 4)
    a, b = (load_results(tmp_path / name / "results.json") for name in "ab")
    assert untimed(a) == untimed(b)
    assert a.acts[0].rows[0].timing != b.acts[0].rows[0].timing, "they were measured twice"


def test_judges(folder: Path, run: Run, tmp_path: Path) -> None:
    words = ("--latency-batch-sizes", "[]", "--quality", "judge-perplexity,judge_bits_per_byte")
    (tmp_path / "two.yaml").write_text("settings:\n  - mode: ar\n  - {mode: block, block_size: 3}\n")
    words += ("--sweep", tmp_path / "two.yaml")  # type: ignore[assignment]
    run(tmp_path, *words, "--judge", folder / "other")
    (act,) = load_results(tmp_path / "results.json").plain()["acts"]
    assert act["quality"] | {"description": ""} == {
        "name": "judge perplexity", "unit": "per token of the judge", "higher_is_better": False, "description": "",
        "aggregate": "perplexity", "judge": str(folder / "other"),
    }  # fmt: skip
    assert all(row["quality"] > 1 for row in act["rows"])
    assert act["aup"] is None
    assert any("true continuations" in note for note in act["notes"])
    assert "repetition-4" in (tmp_path / "report.html").read_text()
    assert all(word in act["quality"]["description"] for word in ("other", "empty outputs"))
    run(tmp_path, *words, "--judge", folder / "model", "--allow-self-judge")
    (act,) = load_results(tmp_path / "results.json").plain()["acts"]
    assert any("the model itself" in note for note in act["notes"])


@pytest.mark.slow
def test_the_ceiling_is_drawn(folder: Path, run: Run, tmp_path: Path) -> None:
    """As the command that looks for it leaves it; another model's is refused."""
    light = tmp_path / "light.json"
    words = [
        "eval", "ceiling", folder / "prompts.jsonl", "--model", folder / "model", "--max-new-tokens", 5,
        "--block-sizes", "[3]", "--rules", "threshold=0.5", "--budget", 50, "--out", light,
    ]  # fmt: skip
    main([str(word) for word in words])
    (found,) = json.loads(light.read_text())["ceilings"]
    run(tmp_path / "out", "--ceiling", light, "--latency-batch-sizes", "[]")
    assert load_results(tmp_path / "out").plain()["acts"][0]["ceiling"] == [found]
    page = (tmp_path / "out" / "report.html").read_text()
    share = 100 * found["rules"]["threshold=0.5"]["of_ceiling"]
    assert page.count("ceiling, block 3") == 1 and f"threshold=0.5 {share:.0f}%" in page
    assert "ceiling, block 3" in (tmp_path / "out" / "frontier.svg").read_text()
    with pytest.raises(SystemExit):
        run(tmp_path / "else", "--ceiling", light, model="other")


@pytest.mark.slow
def test_compare_two_models(folder: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model", "other"):
        run(tmp_path / name, "--latency-batch-sizes", "[]", model=name)
    compared = ["eval", "compare", str(tmp_path / "model")]
    main([*compared, str(tmp_path / "other" / "results.json"), "--out", str(tmp_path / "c.json"), "--resamples", "500"])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "c.json").read_text())
    assert [pair["mode"] for pair in found["pairs"]] == ["ar", "speculative", "block", "diffusion"]
    assert "edit similarity" in said and "AUP" in said and "0.4 would seem" in said
    main([*compared, str(tmp_path / "model"), "--out", str(tmp_path / "c.json")])
    assert {pair["verdict"] for pair in json.loads((tmp_path / "c.json").read_text())["pairs"]} == {"within noise"}

    run(tmp_path / "few", "--count", 11, "--latency-batch-sizes", "[]")
    for other, complaint in ((tmp_path / "few", "other prompts"), (tmp_path / "nowhere", "no such file")):
        with pytest.raises(SystemExit) as ended:
            main([*compared, str(other)])
        assert ended.value.code == 2
        assert complaint in capsys.readouterr().err


def killed_at(words: list[str], journal: Path, lines: int) -> None:
    """Run a command in a process of its own, and kill it once its journal has that many lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrid", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        cwd=journal.parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error.decode()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stopped(
    folder: Path, run: Run, passes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9, and then a torn line as one in the middle of a write would leave."""
    whole = tmp_path / "whole"
    run(whole, "--latency-batch-sizes", "[]", "--repeats", 12)
    total = len(passes)
    assert total == 1 + 4 * 13
    out = tmp_path / "killed"
    out.mkdir()
    journal = out / "journal.jsonl"
    words = [
        "eval", "frontier", "--model", folder / "model", "--prompts", folder / "prompts.jsonl", "--sweep",
        folder / "sweep.yaml", "--out", out, "--max-new-tokens", 5, "--batch-size", 4, "--latency-batch-sizes", "[]",
        "--repeats", 12,
    ]  # fmt: skip
    killed_at([str(word) for word in words], journal, 10)
    kept = journal.read_bytes().count(b"\n")
    assert 10 <= kept < total and not (out / "results.json").exists()
    with journal.open("ab") as torn:
        torn.write(b'{"key": "half a li')
    passes.clear()
    run(out, "--latency-batch-sizes", "[]", "--repeats", 12)
    assert len(passes) == total - kept
    assert untimed(load_results(out)) == untimed(load_results(whole))
    assert journal.read_bytes().count(b"\n") == total


@pytest.mark.slow
def test_two_processes_find_what_one_does(folder: Path, run: Run, tmp_path: Path) -> None:
    words = ("--latency-batch-sizes", "[2]", "--sweep", folder / "sampled.yaml")
    sampled = "  - {mode: block, block_size: 3, do_sample: true, temperature: 1.5}\n"
    (folder / "sampled.yaml").write_text(SWEEP + sampled)
    run(tmp_path / "one", *words)
    given = [
        "--model", folder / "model", "--prompts", folder / "prompts.jsonl", "--out", tmp_path / "two",
        "--max-new-tokens", 5, "--repeats", 1, "--batch-size", 4, *words,
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launch, "-m", "hybrid", "eval", "frontier", *map(str, given)], capture_output=True, text=True, timeout=300,
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = load_results(tmp_path / "one"), load_results(tmp_path / "two")
    assert two.environment["processes"] == 2
    first, second = untimed(one), untimed(two)
    for row in (row for found in (first, second) for act in found["acts"] for row in act["rows"]):
        assert sum(row.pop("forwards").values()) > 0  # which prompts share a forward depends on who decodes them
    assert first == second
    assert done.stdout.count("The page with everything") == 1, "one process speaks"


# --- Complaints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--prompts {0}/nowhere", "prompts: there is no file .*nowhere.*stdlib"),
        ("--prompts {0}/lacks.jsonl", "prompts: .*line 2 lacks prompt"),
        ("--prompts {0}/targetless.jsonl", "prompts: number 2 has no target.*judge_perplexity"),
        ("--prompts {0}/list.jsonl", "prompts: .*line 2 lacks"),
        ("--prompts {0}/broken.jsonl", "prompts: .*line 2 is not JSON"),
        ("--prompts {0}/none.jsonl", "prompts: .*has no lines"),
        ("--prompts {0}/number.jsonl", "prompts: .*line 2: prompt is 3"),
        ("--prompts {0}/both.jsonl", "prompts: .*line 2 has prompt and text"),
        ("--prompts {0}/roles.jsonl", "prompts: .*line 2: messages must be"),
        ("--prompts {0}/long.jsonl", "prompts: number 2 has .* tokens.*context of"),
        ("--max-new-tokens 999", "prompts: number 1 has .*max_new_tokens=999"),
        ("--max-new-tokens 0", "max_new_tokens is 0"),
        ("--count 0", "count is 0"),
        ("--batch-size 0", "batch_size is 0"),
        ("--repeats 0", "repeats is 0"),
        ("--samples -1", "samples is 0"),
        ("--latency-batch-sizes [0]", "latency_batch_sizes: 0"),
        ("--latency-batch-sizes [99]", "latency_batch_sizes: 99 .* 12 prompts"),
        ("--quality vibes", "quality: there is no measure 'vibes'.*edit_similarity.*judge_perplexity"),
        ("--quality parses,parses", "quality is 'parses,parses'"),
        ("--quality judge_perplexity", "judge_perplexity needs --judge"),
        ("--quality judge_perplexity --judge {0}/model", "judge: .*weights of the model itself"),
        ("--quality judge_perplexity --judge {0}/nowhere", "judge: there is no folder"),
        ("--judge {0}/other", "judge: only judge_perplexity"),
        ("--ceiling {0}/prompts.jsonl", "ceiling: .* is not JSON"),
        ("--ceiling {0}/wrong.json", "ceiling: .*wrong.json has no list `ceilings`"),
        ("--device abacus", "device is 'abacus'"),
        ("--sweep {0}/nowhere.yaml", "nowhere.yaml"),
        ("--sweep {0}/bad.yaml", r"bad.yaml, line 3: settings\[1\].mode is 'telepathy'"),
    ],
)
def test_bad_values_are_one_clear_line(
    words: str, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text("settings:\n  - mode: ar\n  - mode: telepathy\n")
    (folder / "wrong.json").write_text('[{"tokens_per_forward": 2.0}]')
    line = f"eval frontier --model {folder}/model --out {tmp_path}/out"
    for option, file in (("--prompts", "prompts.jsonl"), ("--sweep", "sweep.yaml")):
        if option not in words:
            line += f" {option} {folder}/{file}"
    with pytest.raises(SystemExit) as ended:
        main(f"{line} {words.format(folder)}".split())
    assert ended.value.code == 2
    complaint = capsys.readouterr().err
    assert re.search(said, complaint), complaint
    assert complaint.startswith("hybrid: ") and len(complaint.splitlines()) == 1
    assert not (tmp_path / "out" / "results.json").exists()
