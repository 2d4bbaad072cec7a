"""Rows are one long stream that anyone can enter anywhere; documents lie in them apart; errors name the file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hybrid import HybridConfig
from hybrid.noise import Noise, corrupt
from hybrid.training.data import HybridData, SudokuData, TextData
from hybrid.training.tasks.sudoku import split_grids
from hybrid.training.text.rows import NOBODY, InTurn, Rows, pack
from hybrid.training.text.tokenizing import MASK, train_bpe

# --- The stream ---------------------------------------------------------------------------------------------

COUNT = 11


def numbered(**options: Any) -> Rows:
    """Rows that say which row they are: row r is [10 r, 10 r + 1]."""
    ids = 10 * torch.arange(COUNT)[:, None] + torch.arange(2)
    return Rows(ids.int(), ids % 2 == 1, ids * 0 + ids // 10, **options)


def read(rows: Rows, numbers: list[int]) -> list[int]:
    """Which rows these samples are, having checked that all else of them fits."""
    batch = rows.__getitems__(numbers)
    assert batch["index"].tolist() == numbers
    assert batch["input_ids"].dtype == batch["doc"].dtype == batch["index"].dtype == torch.int64
    found = (batch["input_ids"][:, 0] // 10).tolist()
    assert batch["input_ids"].tolist() == [[10 * r, 10 * r + 1] for r in found]
    assert batch["target"].tolist() == [[False, True]] * len(found)
    assert batch["doc"].tolist() == [[r, r] for r in found]
    return found


def orders(rows: Rows, passes: int) -> list[list[int]]:
    """The order of each pass, read in batches that do not care where one ends."""
    end = passes * COUNT
    found = [row for at in range(0, end, 4) for row in read(rows, list(range(at, min(at + 4, end))))]
    return [found[at : at + COUNT] for at in range(0, end, COUNT)]


def test_each_pass_is_a_permutation_of_its_own() -> None:
    rows = numbered(shuffle_seed=3)
    assert len(rows) == COUNT
    found = orders(rows, 5)
    assert all(sorted(order) == list(range(COUNT)) for order in found)
    assert len({tuple(order) for order in found}) == 5
    assert list(range(COUNT)) not in found


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    found = orders(numbered().shuffled(3), 3)
    assert orders(numbered(shuffle_seed=4), 3) != found
    rows = numbered(shuffle_seed=3)
    backwards = [read(rows, [number])[0] for number in reversed(range(3 * COUNT))]
    assert backwards[::-1] == [row for order in found for row in order]
    assert read(rows, [30, 2, 13]) == [found[2][8], found[0][2], found[1][2]]  # across passes, in any order


def test_without_a_seed_rows_keep_their_order() -> None:
    assert orders(numbered(), 2) == [list(range(COUNT))] * 2


def test_processes_take_held_out_rows_in_turn_and_each_once() -> None:
    for processes in (1, 2, 3, 4, 20):
        parts = [list(InTurn(numbered(), processes, n)) for n in range(processes)]
        assert len({len(part) for part in parts}) == 1, "or one would wait for the others for ever"
        assert sorted(n for part in parts for n in part if n != NOBODY) == list(range(COUNT))
    batch = numbered().__getitems__([3, NOBODY])
    assert batch["target"].any(1).tolist() == [True, False]


# --- Packing ------------------------------------------------------------------------------------------------

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13]]


@pytest.mark.parametrize("apart", [True, False])
def test_documents_are_laid_end_to_end_and_cut(apart: bool) -> None:
    rows = pack(DOCUMENTS, 5, begin=1, keep_apart=apart)
    assert rows.ids.tolist() == [[1, 5, 6, 7, 1], [8, 1, 1, 9, 10]]  # 11, 12, 13 fill no row
    # Numbers count from a row's first document; a document that was cut goes on in the next row.
    assert rows.doc.tolist() == ([[0, 0, 0, 0, 1], [0, 1, 2, 2, 2]] if apart else [[0] * 5] * 2)
    assert rows.target.shape == rows.ids.shape
    assert rows.target.dtype == torch.bool
    assert rows.target[rows.ids != 1].all()


def test_whole_rows_are_all_kept() -> None:
    assert pack([[2, 3], [4, 5]], 3, begin=1).ids.tolist() == [[1, 2, 3], [1, 4, 5]]
    assert pack(iter([[2, 3, 4]]), 4, begin=1).ids.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(("documents", "tokens"), [([[2, 3, 4]], 4), ([], 0)])
def test_less_text_than_a_row_is_an_error(documents: list[list[int]], tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens, less than one row of 5.*length"):
        pack(documents, 5, begin=1)


# --- Text files ---------------------------------------------------------------------------------------------

TEXTS = {"a.txt": "The quick brown fox. " * 30, "b.txt": f"Jumps over {MASK} and é…\n" * 30, "sub/c.txt": "Dogs. " * 80}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def loaded(train: list[str], validation: list[str], **options: Any) -> TextData:
    data = TextData(train, validation, **{"length": 16, "vocab_size": 300, **options})
    data.setup()
    return data


def text_of(data: HybridData, rows: Rows) -> list[str]:
    """The documents that rows hold, put together again."""
    flat = rows.ids.flatten().tolist()
    starts = [i for i, token in enumerate(flat) if token == data.tokenizer.bos_token_id]
    parts = [flat[a + 1 : b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return [data.tokenizer.decode(part) for part in parts]


def test_text_comes_out_as_it_went_in(folder: Path) -> None:
    data = loaded([f"{folder}/*.txt"], [f"{folder}/sub/c.txt"])
    found = text_of(data, data.train_rows)
    assert found[0] == TEXTS["a.txt"]
    assert TEXTS["b.txt"].startswith(found[1])
    lost = data.tokenizer.encode(TEXTS["b.txt"].removeprefix(found[1]), split_special_tokens=True)
    assert len(lost) < 16, "no more is cut off than a row"
    assert TEXTS["sub/c.txt"].startswith(text_of(data, data.validation_rows)[0])
    # "<|mask|>" in a text is eight characters, not a question.
    assert data.tokenizer.mask_token_id not in data.train_rows.ids
    assert data.length == 16
    assert data.train_rows.doc.max() == 1


def test_patterns_find_files_below_and_beside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    data = loaded(["**/*.txt"], ["a.txt", "sub/*.txt"])
    assert [text[:9] for text in text_of(data, data.train_rows)] == ["The quick", "Jumps ove", "Dogs. Dog"]
    assert [text[:9] for text in text_of(data, data.validation_rows)] == ["The quick", "Dogs. Dog"]


def test_a_tokenizer_that_is_given_is_used_as_it_is(folder: Path) -> None:
    own = train_bpe(["entirely different words"] * 50, 290)
    own.save_pretrained(folder / "tokenizer")
    data = loaded([f"{folder}/a.txt"], [f"{folder}/a.txt"], tokenizer=str(folder / "tokenizer"))
    assert data.tokenizer.get_vocab() == own.get_vocab()
    assert data.train_rows.ids.flatten().tolist()[1:40] == own.encode(TEXTS["a.txt"])[:39]
    trained = loaded([f"{folder}/a.txt"], [f"{folder}/a.txt"])
    assert trained.tokenizer.get_vocab() != own.get_vocab()


def test_loading_happens_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = loaded([f"{folder}/a.txt"], [f"{folder}/a.txt"])
    monkeypatch.setattr(TextData, "load", lambda self: pytest.fail("loaded twice"))
    data.setup("fit")


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["{folder}/*.md"], r"'.*\*\.md' matches no file"),
        (["{folder}/a.txt", "{folder}/nowhere.txt"], "nowhere.txt' matches no file"),
        (["{folder}/sub"], "sub' matches no file"),  # a folder is no file
        ([""], "'' matches no file"),
        ([], "no files given"),
        (["{folder}/latin.bin"], r"latin\.bin is not UTF-8 text.*byte 3"),
    ],
)
def test_files_that_cannot_be_read_are_named(folder: Path, split: str, patterns: list[str], said: str) -> None:
    (folder / "latin.bin").write_bytes("caf\xe9s".encode("latin-1"))
    good = [f"{folder}/a.txt"]
    bad = [pattern.format(folder=folder) for pattern in patterns]
    data = TextData(*((bad, good) if split == "train" else (good, bad)))
    with pytest.raises(ValueError, match=f"{split}: .*{said}"):
        data.setup()


def test_too_little_text_and_impossible_settings_are_errors(folder: Path) -> None:
    with pytest.raises(ValueError, match="less than one row of 5000"):
        loaded([f"{folder}/a.txt"], [f"{folder}/a.txt"], length=5000)
    with pytest.raises(ValueError, match="vocab_size=20"):
        loaded([f"{folder}/a.txt"], [f"{folder}/a.txt"], vocab_size=20)
    with pytest.raises(ValueError, match="batch_size is 0"):
        TextData([], [], batch_size=0)
    bare = train_bpe(["words"] * 9, 280)
    bare = PreTrainedTokenizerFast(tokenizer_object=bare.backend_tokenizer, mask_token=MASK)
    bare.save_pretrained(folder / "bare")
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        loaded([f"{folder}/a.txt"], [f"{folder}/a.txt"], tokenizer=str(folder / "bare"))


# --- Sudoku -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sudoku() -> SudokuData:
    data = SudokuData(count=2000, seed=5)
    data.setup()
    return data


def test_the_solution_and_nothing_else_is_learned(sudoku: SudokuData) -> None:
    for rows, count in ((sudoku.train_rows, 2000), (sudoku.validation_rows, 512)):
        assert rows.ids.shape == (count, 34)  # bos, 16 clues, "=", 16 digits
        assert (rows.ids[:, 0] == sudoku.tokenizer.bos_token_id).all()
        assert (rows.doc == 0).all()
        for ids, target in zip(rows.ids[:200], rows.target[:200], strict=True):
            clues, solution = sudoku.tokenizer.decode(ids[1:]).split("=")
            assert sudoku.tokenizer.decode(ids[target]) == solution
            assert target[18:].all() and not target[:18].any()
            assert all(a in (".", b) for a, b in zip(clues, solution, strict=True))


def test_held_out_grids_are_never_trained_on(sudoku: SudokuData) -> None:
    def grids(rows: Rows) -> set[str]:
        return {sudoku.tokenizer.decode(ids[18:]) for ids in rows.ids}

    trained, held_out = split_grids(seed=5)
    assert grids(sudoku.train_rows) <= set(trained)
    assert grids(sudoku.validation_rows) <= set(held_out)
    assert not grids(sudoku.train_rows) & grids(sudoku.validation_rows)
    assert len(grids(sudoku.train_rows)) > 200
    shown = [sudoku.tokenizer.decode(ids[1:]) for ids in sudoku.validation_rows.ids]
    assert shown == sudoku.held_out


def test_puzzles_depend_on_the_seed_alone(sudoku: SudokuData) -> None:
    again, other = SudokuData(count=2000, seed=5), SudokuData(count=2000, seed=6)
    again.setup()
    other.setup()
    assert torch.equal(again.train_rows.ids, sudoku.train_rows.ids)
    assert torch.equal(again.validation_rows.ids, sudoku.validation_rows.ids)
    assert not torch.equal(other.train_rows.ids, sudoku.train_rows.ids)


def test_the_number_of_clues_is_as_asked() -> None:
    data = SudokuData(count=300, clues=(6, 7))
    data.setup()
    dot = data.tokenizer.convert_tokens_to_ids(".")
    assert set((data.train_rows.ids != dot)[:, 1:17].sum(1).tolist()) == {6, 7}


# --- Batches ------------------------------------------------------------------------------------------------


def of_a_job(samples: int, processes: int = 1, rank: int = 0, accumulate: int = 1) -> SimpleNamespace:
    """As if a trainer had the data, whose steps have used so many samples of them."""
    count = SimpleNamespace(processed=0)
    progress = SimpleNamespace(total=count, current=SimpleNamespace(processed=0))
    return SimpleNamespace(
        world_size=processes, global_rank=rank, accumulate_grad_batches=accumulate, global_step=min(samples, 1),
        overfit_batches=0, num_training_batches=10**9, count=count,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


def test_training_goes_on_beyond_one_pass_and_validation_does_not() -> None:
    data = SudokuData(count=10, batch_size=4)
    data.setup()
    data.trainer = of_a_job(0)
    batches, numbers = data.train_dataloader(), []
    for _ in range(3):
        for batch in batches:
            numbers += batch["index"].tolist()
            data.trainer.count.processed += 1
            data.trainer.global_step += 1
    assert numbers == list(range(24)), "an epoch has two whole batches, and nothing between two is lost"
    held_out = [batch["input_ids"] for batch in data.val_dataloader()]
    assert torch.equal(torch.cat(held_out), data.validation_rows.ids.long())


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_stream_and_go_on_in_it_together(processes: int) -> None:
    seen: list[int] = []
    for rank in range(processes):
        data = SudokuData(count=10, batch_size=4 // processes, seed=1)
        data.setup()
        data.trainer = of_a_job(24, processes, rank, accumulate=3)
        data.load_state_dict({"samples": 24})
        batches = iter(data.train_dataloader())
        seen += [number for _ in range(3) for number in next(batches)["index"].tolist()]
    assert sorted(seen) == list(range(2 * 3 * 4, 3 * 3 * 4)), "the third step, as one process would take it"


def corrupted(
    data: SudokuData, processes: int, batch_size: int, accumulate: int, noise: Noise
) -> list[dict[int, list[float]]]:
    """For each of two steps, after three that are done: tokens, weights and masks of each sample, by its number."""
    config = HybridConfig(vocab_size=10, mask_token_id=0, hidden_size=8, num_attention_heads=2, block_size=4)
    steps: list[dict[int, list[float]]] = [{}, {}]
    for rank in range(processes):
        data.batch_size = batch_size
        data.trainer = of_a_job(24, processes, rank, accumulate)
        data.load_state_dict({"samples": 24})
        batches = data.train_dataloader()
        for step in steps:
            for batch in batches:
                data.trainer.count.processed += 1
                ids, target, doc, index = (batch[key] for key in ("input_ids", "target", "doc", "index"))
                found = corrupt(ids, target, doc, index, noise, config, seed=4)
                for row, number in enumerate(index.tolist()):
                    assert number not in step
                    unseen = [0.0] * found.begin
                    step[number] = [
                        *ids[row].tolist(), *unseen, *found.weight[row].tolist(), *unseen, *found.masked[row].tolist()
                    ]
    return steps


@pytest.mark.parametrize("noise", [Noise(), Noise(antithetic=False, t_per="sequence", draft_prob=0.4)])
def test_noise_of_a_step_is_the_same_however_it_is_split(noise: Noise) -> None:
    data = SudokuData(count=10, batch_size=8, seed=1)
    data.setup()
    whole = corrupted(data, 1, 8, 1, noise)
    assert [sorted(step) for step in whole] == [list(range(24, 32)), list(range(32, 40))]
    assert len({tuple(sample) for step in whole for sample in step.values()}) == 16
    for split in ((2, 4, 1), (4, 2, 1), (1, 2, 4), (2, 2, 2), (4, 1, 2), (1, 1, 8)):
        assert corrupted(data, *split, noise) == whole


def test_a_base_class_says_what_it_lacks() -> None:
    with pytest.raises(TypeError, match="HybridData must define load"):
        HybridData(1, 0).setup()
