"""Tasks whose answers are checked: prompts, scores, orders, and the command that decodes them."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from hybrid.commands import main
from hybrid.commands.reasoning import TASKS, data_of, find_task, orders
from hybrid.training.data import SudokuData
from hybrid.training.module import new_model
from hybrid.training.questions import CountdownData
from hybrid.training.sudoku import Sudoku
from hybrid.training.tokenizers import character_tokenizer

CONFIG = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 128, "block_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def alphabets() -> dict[str, str]:
    from hybrid.training.countdown import ALPHABET

    return {
        "sudoku4": Sudoku().alphabet, "sudoku6": Sudoku(rows=2, columns=3).alphabet, "countdown": ALPHABET,
    }  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, alphabets: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("reasoning") / "model"
    tokenizer = character_tokenizer(alphabets["sudoku4"])
    new_model(CONFIG, tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_asks_what_its_recipe_held_out_and_accepts_right_answers_alone(
    name: str, alphabets: dict[str, str]
) -> None:
    tokenizer = character_tokenizer(alphabets[name])
    task = find_task(name, tokenizer, count=12)
    assert len(task.prompts) == 12
    for prompt in task.prompts:
        assert prompt.ids[0] == tokenizer.bos_token_id and tokenizer.decode(prompt.ids[1:]) == prompt.text
        assert len(tokenizer.encode(prompt.target)) <= task.max_new_tokens
        assert task.score(prompt.text, prompt.target, prompt.target) == 1.0
        for wrong in (prompt.target[:-1], prompt.target + "1", prompt.target[::-1] + "(", "", "💥", "9**9**9"):
            assert task.score(prompt.text, wrong, prompt.target) == 0.0
    data = data_of(name)
    assert isinstance(data, SudokuData | CountdownData)
    asked = [prompt.text + prompt.target for prompt in task.prompts]
    assert asked == ["".join(question) for question in data.test(12)]


def test_another_right_expression_is_right(alphabets: dict[str, str]) -> None:
    task = find_task("countdown", character_tokenizer(alphabets["countdown"]), count=2)
    assert task.score("6,4,2,1:25=", "1+6*4*2-24", "") == 0.0
    assert task.score("6,4,2,1:49=", "1+2*6*4", "6*4*2+1") == 1.0


def test_a_recipe_of_ones_own_is_a_task(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    arguments = {"name": "chain_sum", "count": 40, "held_out": 6, "config": {"min_terms": 3, "max_terms": 3}}
    kind = "hybrid.training.questions.ReasoningData"
    recipe = tmp_path / "config.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"class_path": kind, "init_args": arguments}}))
    data = data_of(str(recipe))
    data.setup()
    task = find_task(str(recipe), data.tokenizer, count=5)
    assert "chain_sum" in task.title and task.max_new_tokens == data.validation_rows.target.sum(1).max()
    for prompt in task.prompts:
        assert task.score(prompt.text, prompt.target, "") == 1.0 and task.score(prompt.text, "x", "") == 0.0
    trained = {data.tokenizer.decode(ids[1:]) for ids in data.train_rows.ids}
    assert not any(text.startswith(prompt.text) for prompt in task.prompts for text in trained)
    with pytest.raises(ValueError, match="held 6 questions out"):
        find_task(str(recipe), data.tokenizer, count=7)


def test_orders_are_named_once_and_differ() -> None:
    settings = orders((0.9, 0.8), (4, 6))
    assert len({s.name for s in settings}) == len(settings) == len({str((s.mode, s.options)) for s in settings})
    assert [s.mode for s in settings].count("speculative") == 2


def test_the_command_prints_every_order_and_writes_what_it_found(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    main([
        "eval", "reasoning", str(saved), "sudoku4", "--count", "6", "--thresholds", "[0.9]", "--block-sizes", "[4]",
        "--out", str(tmp_path),
    ])  # fmt: skip
    said = capsys.readouterr().out
    for name in ("left to right", "drafts, random order", "drafts, surest first", "window 4", "held out of training"):
        assert name in said
    [act] = json.loads((tmp_path / "results.json").read_text())["acts"]
    assert len(act["rows"]) == 7
    sudoku = Sudoku()
    for row in act["rows"]:
        solved = [sudoku.solved(s["prompt"] + s["outputs"][row["setting"]]) for s in act["samples"]]
        assert row["quality"] == sum(solved) / 6 and row["prompts"] == 6
        assert row["tokens_out"] == 6 * 16
    by_name = {row["setting"]: row for row in act["rows"]}
    assert by_name["window 4"]["agreement"] == 1.0
    for name in ("left to right", "drafts, left to right", "drafts, surest first"):
        assert by_name[name]["tokens_per_forward"] == 1.0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{model}", "chess"], "task: there is no 'chess'; use sudoku4"),
        (["{model}", "sudoku4", "--count", "0"], "count is 0"),
        (["{model}", "countdown"], "model: its tokenizer"),
        (["{model}", "{folder}/none.yaml"], "none.yaml"),
        (["{model}", "{folder}/empty.yaml"], "no usable data section"),
        (["{model}", "{folder}/text.yaml"], "no answers that can be checked"),
        (["{model}", "{folder}/other.yaml"], "no HybridData"),
    ],
)
def test_bad_input_is_told(
    words: list[str], says: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "text.yaml").write_text("data: {class_path: hybrid.training.data.StdlibData}")
    (tmp_path / "other.yaml").write_text("data: {class_path: builtins.dict}")
    given = [word.format(model=saved, folder=tmp_path) for word in words]
    with pytest.raises(SystemExit):
        main(["eval", "reasoning", *given])
    assert says in capsys.readouterr().err
