"""`hybrid eval infill`: what it prints, leaves and complains of."""

import json
import re
from pathlib import Path

import pytest
import torch
from oracles import tiny

from hybrid.commands import main
from hybrid.evals.results import load_results
from hybrid.training.callbacks import save_folder
from hybrid.training.text.tokenizing import train_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("infill")
    tokenizer = train_bpe(["x" * 9], 259)
    given = {"mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
    save_folder(tiny(1, dtype=torch.float32, vocab_size=len(tokenizer), **given), tokenizer, root / "model")
    (root / "code" / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        functions = [f"def f{n}(x):\n    y = x + {n}\n    return y\n" for n in range(4)]
        (root / "code" / f"{name}.py").write_text("\n".join(functions))
    (root / "empty").mkdir()
    (root / "plain.py").write_text("x = 1\n")
    (root / "broken.py").write_text("def f(:\n")
    return root


def test_it_fills_gaps_of_all_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"eval infill --source {folder}/code --model {folder}/model --kind line --limit 5 "
    line += f"--out {tmp_path}/x/found.json "
    line += "--options confidence_threshold=0.3"
    state = torch.get_rng_state()
    main(line.split())
    assert torch.equal(torch.get_rng_state(), state)
    said = capsys.readouterr().out
    assert re.search(r"infill .*%.*±.*%", said) and re.search(r"left to right .*%.*1\.00", said)
    found = json.loads((tmp_path / "x" / "found.json").read_text())
    assert found["gaps"] == len(found["answers"]) == 5 and found["options"] == {"confidence_threshold": 0.3}
    main(line.replace("--limit 5", "--limit 99 --batch-size 2").split())
    found = json.loads((tmp_path / "x" / "found.json").read_text())
    assert found["gaps"] == 8 and {answer["name"].split(":")[0] for answer in found["answers"]} == {"a.py", "b.py"}
    for act in load_results(tmp_path / "x" / "found.json").plain()["acts"]:
        metric = act["quality"]["name"].replace(" ", "_")
        figures = [found[metric]["value"], found["left_to_right"][metric]["value"]]
        assert [row["quality"] for row in act["rows"]] == figures
        assert [row["mode"] for row in act["rows"]] == ["infill", "ar"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--source {0}/nowhere", "source: there is no .*nowhere"),
        ("--source {0}/empty", "source: .* holds no Python file"),
        ("--source {0}/plain.py", r"source: .*plain\.py has no function"),
        ("--source {0}/broken.py", r"broken\.py is not Python"),
        ("--source {0}/code --limit 0", "limit is 0"),
        ("--source {0}/code --max-gap 1", "there is nothing to fill"),
        ("--source {0}/code --options temperature=0.5", "temperature only matters"),
    ],
)
def test_bad_values_are_one_clear_line(
    words: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"eval infill --model {folder}/model {words}".format(folder).split())
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert re.search(f"^hybrid: {said}", err) and len(err.splitlines()) == 1
