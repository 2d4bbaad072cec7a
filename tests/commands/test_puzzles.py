"""Prompts whose answers are checked: what is asked, how it is scored, and the frontier of them in several orders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.commands import main
from hybrid.commands.eval.prompts import PUZZLES, Source, data_of, source_of
from hybrid.evals.passes.outputs import Prompt
from hybrid.training.data import SudokuData
from hybrid.training.running.start import new_model
from hybrid.training.tasks.questions import CountdownData
from hybrid.training.tasks.sudoku import Sudoku
from hybrid.training.text.tokenizing import character_tokenizer

CONFIG = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 128, "block_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def alphabets() -> dict[str, str]:
    from hybrid.training.tasks.countdown import ALPHABET

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


def asked(name: str, tokenizer: Any, count: int) -> Source:
    return source_of(name, HybridForCausalLM(HybridConfig(**CONFIG, vocab_size=8)), tokenizer, count, None)


def score(source: Source, given: str, output: str, target: str = "") -> float:
    return source.measures["solved"].grade([Prompt(ids=[0], text=given, target=target)], [output]).values[0]


@pytest.mark.parametrize("name", list(PUZZLES))
def test_a_puzzle_is_one_that_its_recipe_held_out_and_right_answers_alone_count(
    name: str, alphabets: dict[str, str]
) -> None:
    tokenizer = character_tokenizer(alphabets[name])
    source = asked(name, tokenizer, 12)
    assert len(source.prompts) == 12
    for prompt in source.prompts:
        assert prompt.ids[0] == tokenizer.bos_token_id and tokenizer.decode(prompt.ids[1:]) == prompt.text
        assert len(tokenizer.encode(prompt.target)) <= source.max_new_tokens
        assert score(source, prompt.text, prompt.target, prompt.target) == 1.0
        for wrong in (prompt.target[:-1], prompt.target + "1", prompt.target[::-1] + "(", "", "💥", "9**9**9"):
            assert score(source, prompt.text, wrong, prompt.target) == 0.0
    data = data_of(name)
    assert isinstance(data, SudokuData | CountdownData)
    assert [p.text + p.target for p in source.prompts] == ["".join(question) for question in data.test(12)]


def test_another_right_expression_is_right(alphabets: dict[str, str]) -> None:
    source = asked("countdown", character_tokenizer(alphabets["countdown"]), 2)
    assert score(source, "6,4,2,1:25=", "1+6*4*2-24") == 0.0
    assert score(source, "6,4,2,1:49=", "1+2*6*4", "6*4*2+1") == 1.0


def test_a_recipe_of_ones_own_is_asked(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    arguments = {"name": "chain_sum", "count": 40, "held_out": 6, "config": {"min_terms": 3, "max_terms": 3}}
    kind = "hybrid.training.tasks.questions.ReasoningData"
    recipe = tmp_path / "config.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"class_path": kind, "init_args": arguments}}))
    data = data_of(str(recipe))
    data.setup()
    source = asked(str(recipe), data.tokenizer, 5)
    assert "chain_sum" in source.measures["solved"].description
    assert source.max_new_tokens == data.validation_rows.target.sum(1).max()
    for prompt in source.prompts:
        assert score(source, prompt.text, prompt.target) == 1.0 and score(source, prompt.text, "x") == 0.0
    trained = {data.tokenizer.decode(ids[1:]) for ids in data.train_rows.ids}
    assert not any(text.startswith(prompt.text) for prompt in source.prompts for text in trained)
    with pytest.raises(ValueError, match="held 6 questions out"):
        asked(str(recipe), data.tokenizer, 7)


def test_the_frontier_of_puzzles_in_several_orders(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    main([
        "eval", "frontier", "--model", str(saved), "--prompts", "sudoku4", "--sweep", "orders", "--count", "6",
        "--repeats", "1", "--latency-batch-sizes", "[]", "--out", str(tmp_path),
    ])  # fmt: skip
    said = capsys.readouterr().out
    for name in ("left to right", "drafts, random order", "drafts, surest first", "window 4"):
        assert name in said
    [act] = json.loads((tmp_path / "results.json").read_text())["acts"]
    sudoku = Sudoku()
    for row in act["rows"]:
        solved = [sudoku.solved(s["prompt"] + s["outputs"][row["setting"]]) for s in act["samples"]]
        assert row["quality"] == sum(solved) / 6 and row["prompts"] == 6
        assert row["tokens_out"] == 6 * 16
    by_name = {row["setting"]: row for row in act["rows"]}
    assert by_name["window 4"]["agreement"] == by_name["window 6, fused"]["agreement"] == 1.0
    for name in ("left to right", "drafts, left to right", "drafts, surest first"):
        assert by_name[name]["tokens_per_forward"] == 1.0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("chess", "no file chess; name one, or stdlib, sudoku, sudoku4"),
        ("sudoku4 --count 0", "count is 0"),
        ("countdown", "no token for some character"),
        ("{folder}/none.yaml", "none.yaml"),
        ("{folder}/empty.yaml", "no usable data section"),
        ("{folder}/text.yaml", "no answers that can be checked"),
        ("{folder}/other.yaml", "no HybridData"),
        ("sudoku4 --sweep disorder", "sweep: there is no file disorder; name one, or default or full or orders"),
    ],
)
def test_bad_input_is_told(
    words: str, says: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "text.yaml").write_text("data: {class_path: hybrid.training.data.StdlibData}")
    (tmp_path / "other.yaml").write_text("data: {class_path: builtins.dict}")
    with pytest.raises(SystemExit):
        main(["eval", "frontier", "--model", str(saved), "--prompts", *words.format(folder=tmp_path).split()])
    assert says in capsys.readouterr().err
