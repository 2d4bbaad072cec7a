"""Rows of questions: what is learned, what is filled up, what is padded, and what is held out."""

import json
import string
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from hybrid.training.data import HybridData, SudokuData
from hybrid.training.module import HybridTask
from hybrid.training.objective import Objective
from hybrid.training.tasks import prompts
from hybrid.training.tasks.questions import CountdownData, ReasoningData, prompt
from hybrid.training.text.rows import answer_rows
from hybrid.training.text.tokenizing import character_tokenizer

TOKENIZER = character_tokenizer("abc=")
END, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def test_answers_are_learned_filled_with_ends_and_rows_padded() -> None:
    rows = answer_rows(TOKENIZER, [("ab=", "c"), ("a=", "bcb")], 4)
    a, b, c, equals = (TOKENIZER.convert_tokens_to_ids(x) for x in "abc=")
    assert rows.ids.tolist() == [
        [END, a, b, equals, c, END, END, END],
        [END, a, equals, b, c, b, END, PAD],
    ]
    assert rows.target.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 0]]
    assert rows.doc.tolist() == [[0] * 8, [0] * 7 + [-1]]
    with pytest.raises(ValueError, match="answer_length is 2"):
        answer_rows(TOKENIZER, [("ab=", "c"), ("a=", "bcb")], 2)


def test_answers_of_one_length_need_no_end() -> None:
    rows = answer_rows(TOKENIZER, [("ab=", "cc"), ("ac=", "cb")])
    assert rows.ids.shape == (2, 6) and (rows.ids[:, 1:] != END).all() and (rows.doc == 0).all()


def gym(**fields: object) -> Callable[[], ReasoningData]:
    def make() -> ReasoningData:
        pytest.importorskip("reasoning_gym")
        return ReasoningData(name="mini_sudoku", count=60, held_out=10, batch_size=4, **fields)  # type: ignore[arg-type]

    return make


DATA: dict[str, Callable[[], HybridData]] = {
    "sudoku6": lambda: SudokuData(box=(2, 3), clues=(14, 24), count=60, batch_size=4),
    "countdown": lambda: CountdownData(count=60, batch_size=4),
    "gym": gym(),
    "gym, bpe": gym(tokenizer="bpe", vocab_size=400),
}


@pytest.fixture(scope="module", params=list(DATA))
def data(request: pytest.FixtureRequest) -> HybridData:
    found = DATA[request.param]()
    found.setup()
    return found


def test_a_row_is_a_question_and_its_answer(data: HybridData) -> None:
    asked: dict[bool, set[str]] = {}
    for held_out, rows in ((False, data.train_rows), (True, data.validation_rows)):
        texts = []
        for ids, target, doc in zip(rows.ids, rows.target, rows.doc, strict=True):
            assert ids[0] == data.tokenizer.bos_token_id and not target[0]
            assert not target[doc < 0].any() and (ids[doc < 0] == data.tokenizer.pad_token_id).all()
            first = int(target.int().argmax())
            assert target[first : int((doc >= 0).sum())].all(), "the answer is the rest of the row"
            question = data.tokenizer.decode(ids[1:first])
            answer = data.tokenizer.decode(ids[target], skip_special_tokens=True)
            texts.append((question, answer))
        asked[held_out] = {question for question, _ in texts}
        if isinstance(data, SudokuData):
            assert all(data.sudoku.solved(question + answer) for question, answer in texts)
            whole = [[data.tokenizer.bos_token_id, *data.tokenizer.encode(q + a)] for q, a in texts]
            assert rows.ids.tolist() == whole
        elif isinstance(data, ReasoningData):
            if held_out:
                assert texts == [(prompt(e), e["answer"]) for e in data.held_out] and len(texts) == 10
                assert [e["question"] for e in data.test(4)] == [e["question"] for e in data.held_out[:4]]
        else:
            from hybrid.training.tasks.countdown import solved

            assert all(solved(question + answer) for question, answer in texts)
    assert not asked[False] & asked[True]


def test_three_steps_of_a_fit_change_the_model(data: HybridData, tmp_path: Path) -> None:
    config = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 1024, "block_size": 4,
    }  # fmt: skip
    task = HybridTask(config, objective=Objective(diffusion_weight=1.0))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=1, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, data)
    assert task.model is not None and trainer.global_step == 3
    for name in ("train/loss", "train/ar", "train/diffusion"):
        assert torch.isfinite(trainer.callback_metrics[name])
    assert trainer.callback_metrics["train/ar"] > 0


def test_what_is_held_out_does_not_depend_on_what_is_trained_on() -> None:
    few, many = (CountdownData(count=count, numbers=(3, 3)) for count in (5, 40))
    for found in (few, many):
        found.setup()
    assert few.held_out == many.held_out == few.test(512, validation=True) != few.test(512)
    some = [SudokuData(count=count, clues=(9, 11)) for count in (5, 40)]
    for data in some:
        data.setup()
    assert some[0].held_out == some[1].held_out == some[0].test(512, validation=True) != some[0].test(512)
    assert SudokuData(seed=1, clues=(9, 11)).test(20) != SudokuData(seed=2, clues=(9, 11)).test(20)


def test_more_than_was_held_out_is_refused() -> None:
    with pytest.raises(ValueError, match="held 10 questions out"):
        gym()().test(11)


@pytest.mark.parametrize("fields", [{"count": 0}, {"held_out": 0}, {"batch_size": 0}])
def test_sizes_are_checked(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ReasoningData(name="mini_sudoku", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [CountdownData, SudokuData])
def test_nothing_to_train_on_is_refused(kind: type[HybridData]) -> None:
    with pytest.raises(ValueError, match="count is 0; it must be at least 1"):
        kind(count=0)  # type: ignore[call-arg]


def test_a_tokenizer_of_ones_own_needs_begin_end_and_padding(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("".join(sorted(set(string.printable))))
    tokenizer.save_pretrained(tmp_path / "whole")
    pytest.importorskip("reasoning_gym")
    found = ReasoningData(name="chain_sum", count=20, held_out=5, batch_size=4, tokenizer=str(tmp_path / "whole"))
    found.setup()
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    lacking = ReasoningData(name="chain_sum", count=20, held_out=5, batch_size=4, tokenizer=str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="bare has no pad_token_id"):
        lacking.setup()


@pytest.mark.parametrize(
    ("split", "least"), [("train", 3000), ("held-out", 10), ("python", 500), ("held-out-python", 20)]
)
def test_prompts_come_as_lines_that_commands_read(
    split: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.main(split)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [line["prompt"] if "prompt" in line else line["messages"][0]["content"] for line in lines]
    assert len(texts) >= least and len(set(texts)) > 0.99 * len(texts) and all(text.strip() for text in texts)
    with pytest.raises(SystemExit, match="'all' is no split"):
        prompts.main("all")
