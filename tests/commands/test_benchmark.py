"""`hybrid eval benchmark`: what it prints, leaves and complains of."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_files import write_all
from oracles import tiny

from hybrid.commands import main
from hybrid.evals.results import load_results
from hybrid.training.callbacks import save_folder
from hybrid.training.text.tokenizing import train_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmark")
    tokenizer = train_bpe(["x" * 9], 259)
    given = {"mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
    save_folder(tiny(1, dtype=torch.float32, vocab_size=len(tokenizer), **given), tokenizer, root / "model")
    write_all(root / "packages")
    return root


@pytest.fixture(autouse=True)
def packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder / "packages")


def test_it_prints_figures_and_leaves_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"eval benchmark gsm8k,hellaswag,lambada,humaneval --model {folder}/model --limit 2 --max-gen-toks 5 "
    line += "--mode block --options confidence_threshold=0.3,block_size=3 --execute-code "
    line += f"--out {tmp_path}/new/found.json"
    state = torch.get_rng_state()
    main(line.split())
    assert torch.equal(torch.get_rng_state(), state)
    said = capsys.readouterr().out
    for words in ("gsm8k .*bits per byte", "gsm8k .*exact match", "hellaswag .*accuracy per character",
                  "lambada .*greedy accuracy", "humaneval .*pass at 1", r"\d+ tokens generated, \d+\.\d\d a forward"):
        assert re.search(words, said), words  # fmt: skip
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert [entry["benchmark"] for entry in found["benchmarks"]] == ["gsm8k", "hellaswag", "lambada", "humaneval"]
    assert all(entry["questions"] == len(entry["answers"]) == 2 for entry in found["benchmarks"])
    assert found["settings"]["options"] == {"confidence_threshold": 0.3, "block_size": 3}
    assert found["mode"] == "block" and found["tokens_per_forward"] > 0
    assert found["benchmarks"][3]["answers"][0]["outcome"] != "passed"
    acts = {act["name"]: act for act in load_results(tmp_path / "new" / "found.json").plain()["acts"]}
    for entry in found["benchmarks"]:
        for metric, figure in entry["metrics"].items():
            (row,) = acts[f"{entry['benchmark']}: {metric.replace('_', ' ')}"]["rows"]
            assert row["quality"] == figure["value"] and len(row["per_prompt"]["quality"]) == 2
            assert row["mode"] == ("block" if metric in ("exact_match", "pass_at_1") else "ar")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("gsm9k", "there is no benchmark 'gsm9k'"),
        ("gsm8k,humaneval", "humaneval: .*--execute-code runs it in a process with limits, --likelihood-only"),
        ("gsm8k --limit 0", "limit is 0"),
        (",", "names: name at least one"),
        ("gsm8k --options fast", "options is 'fast'"),
        ("gsm8k --options temperature=0.5", "temperature only matters"),
        ("gsm8k --samples 0", "samples is 0"),
        ("gsm8k --max-gen-toks 0", "max_gen_toks is 0"),
    ],
)
def test_bad_values_are_one_clear_line(
    words: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"eval benchmark {words} --model {folder}/model".split())
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert re.search(f"^hybrid: {said}", err) and len(err.splitlines()) == 1


def test_an_interrupt_leaves_what_is_finished(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = sys.modules["hybrid.commands.eval.benchmark"]
    ours = command.examine

    def pressed(answers: Any, name: str, *given: Any, **options: Any) -> Any:
        if name == "lambada":
            raise KeyboardInterrupt
        return ours(answers, name, *given, **options)

    monkeypatch.setattr(command, "examine", pressed)
    line = f"eval benchmark hellaswag,hellaswag,lambada --model {folder}/model --limit 2 --out {tmp_path}/found.json"
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 130 and "Interrupted" in capsys.readouterr().err
    found = json.loads((tmp_path / "found.json").read_text())
    assert [entry["benchmark"] for entry in found["benchmarks"]] == ["hellaswag"], "named twice, asked once"
    assert load_results(tmp_path / "found.json")
