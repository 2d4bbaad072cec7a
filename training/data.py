"""Data for training: text of many kinds, and puzzles, as rows (see `hybrid.training.text.rows`)."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import PreTrainedTokenizerBase

from hybrid.checkpoints.folder import load_tokenizer
from hybrid.common.checks import require
from hybrid.common.files import cache_folder
from hybrid.texts import decode, encode_document
from hybrid.training.batch import Batch
from hybrid.training.tasks.stdlib import load_stdlib
from hybrid.training.tasks.sudoku import Sudoku, sample_puzzles, split_grids
from hybrid.training.text.documents import Chat, Documents
from hybrid.training.text.rows import InTurn, Rows, cut, fitted, pack
from hybrid.training.text.token_cache import Tokens, tokenized
from hybrid.training.text.tokenizing import character_tokenizer, train_bpe


class HybridData(L.LightningDataModule):
    """What the training job asks of its data: a tokenizer, and rows for training, validation and a last test.

    Subclasses set `tokenizer`, `train_rows`, `validation_rows` and `test_rows` in `load`.

    Args:
        batch_size: rows a step and process.
        seed: of the order of the rows.
        num_workers: processes that make batches ready; 0 is this one.

    Raises:
        ValueError: a number is out of range.

    Attributes:
        length_asked: tokens a row, where that is known before data are read.
        test_rows: None where there are none.
    """

    tokenizer: PreTrainedTokenizerBase
    train_rows: Rows
    validation_rows: Rows
    test_rows: Rows | None = None
    length_asked: int | None = None

    def __init__(self, batch_size: int, seed: int, num_workers: int = 0) -> None:
        super().__init__()
        require(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1.")
        require(num_workers >= 0, f"num_workers is {num_workers}; it must not be negative.")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self._loaded = False
        self._resumed: int | None = None
        self._begin = (0, 0, 1)  # a sample of the stream, how many batches were learned then, and samples a batch

    def load(self) -> None:
        """Set the tokenizer and the rows; asked once a process, before anything is read from them.

        Raises:
            TypeError: a subclass does not define it.
        """
        raise TypeError(f"{type(self).__name__} must define load().")

    def check(self) -> None:
        """Raise ValueError for what can be seen to be wrong before data are read."""

    def setup(self, stage: str | None = None) -> None:
        if not self._loaded:
            self.load()
            self._loaded = True

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.train_rows.ids.shape[1]

    @functools.cached_property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the text that a token to be learned stands for, on average over the first validation rows."""
        tokens = size = 0
        for row, target in zip(self.validation_rows.ids[:256], self.validation_rows.target[:256], strict=True):
            tokens += int(target.sum())
            size += len(decode(self.tokenizer, row[target].tolist()).encode())
        return max(size, 1) / max(tokens, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        """The rows as one stream. An epoch has as many whole steps as a pass over the rows, and begins where the one
        before has ended."""
        rows, trainer = self.train_rows.shuffled(self.seed), self.trainer
        if trainer is not None and trainer.overfit_batches:
            # The same few again and again, each time with other noise: as rows that have no number.
            return self._loader(rows, sampler=SequentialSampler(rows), collate_fn=_unnumbered)
        processes, process, accumulated = 1, 0, 1
        if trainer is not None:
            processes, process, accumulated = trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches
        a_step = accumulated * self.batch_size * processes
        self._begin = (self._position(), _batches_learned(trainer), self.batch_size * processes)
        self._resumed = None
        batches = max(1, len(rows) // a_step) * accumulated
        turns = InTurn(rows, processes, process, batches * self.batch_size, self._position)
        return self._loader(rows, sampler=turns)

    def _position(self) -> int:
        """The number of samples that the job's steps have used, whatever the size of each of them."""
        trainer = self.trainer
        if trainer is None or trainer.global_step == 0:
            return 0
        if self._resumed is not None:
            return self._resumed
        samples, batches, a_batch = self._begin
        return samples + (_batches_learned(trainer) - batches) * a_batch

    def val_dataloader(self) -> DataLoader[Any]:
        return self._held_out(self.validation_rows)

    def test_dataloader(self) -> DataLoader[Any]:
        """What neither training nor any choice during it has seen, for `test` and `predict`.

        Raises:
            ValueError: there is nothing of that kind.
        """
        if self.test_rows is None:
            raise ValueError("data: there is no text to test on; give `test`, as `train` and `validation` are given.")
        return self._held_out(self.test_rows)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()

    def _held_out(self, rows: Rows) -> DataLoader[Any]:
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return self._loader(rows)
        return self._loader(rows, sampler=InTurn(rows, trainer.world_size, trainer.global_rank))

    def _loader(self, rows: Dataset[Any], **given: Any) -> DataLoader[Any]:
        return DataLoader(rows, **{
            "batch_size": self.batch_size, "collate_fn": _as_is, "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0, **given,
        })  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Where in the stream the job is."""
        return {"samples": self._position()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get("samples")


def _batches_learned(trainer: L.Trainer | None) -> int:
    """Batches of this process in steps that are done, over all epochs."""
    if trainer is None:
        return 0
    progress = trainer.fit_loop.epoch_loop.batch_progress
    here = progress.current.processed
    half = here % trainer.accumulate_grad_batches if here < trainer.num_training_batches else 0
    return int(progress.total.processed - half)


def _as_is(batch: Any) -> Any:
    return batch  # `Rows` gives whole batches


def _unnumbered(batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "index"}


class TextData(HybridData):
    """Texts and conversations from files or datasets, tokenised once and packed.

    Args:
        train: files or patterns of text, JSONL or parquet, or `datasets://NAME` (see `hybrid.training.text.documents`).
        validation: the same, held out.
        tokenizer: a folder or hub name; None trains a byte-level BPE on the training texts. Conversations need one with
            a chat template, and only what the assistant says is learned.
        length: tokens a row.
        vocab_size: of the tokenizer to be trained.
        batch_size: rows a step and process.
        seed: of the order of the rows.
        column: of JSONL lines and table rows: where the text or the list of messages is. As it is, `messages` is
            looked at where there is no `text`.
        on_bad_line: "error" stops at a line that cannot be used, "skip" leaves it out; both name it.
        cache: folder for the tokens; None is `hybrid.common.files.cache_folder()`.
        eos_tokens: EOS tokens behind each document, learned with it. One teaches where texts end, where a chat template
            does not write it. As many as a window is long teach what stands behind the end in it; how much all these
            count is `Objective.eos_padding_weight`.
        test: like `validation`, for `hybrid train test` and `predict`.
        num_workers: processes that make batches ready; 0 is this one.
        pack: "cut" lays documents end to end and cuts them into rows; "fit" cuts none that a row has room for, and
            pads what is left (best fit, arXiv 2404.10830): for conversations. Its rows are kept in memory.

    Raises:
        ValueError: a pattern matches no file, a line cannot be used, or the text is shorter than one row.
    """

    def __init__(
        self, train: list[str], validation: list[str], tokenizer: str | None = None, length: int = 256,
        vocab_size: int = 2048, batch_size: int = 32, seed: int = 0, column: str = "text",
        on_bad_line: Literal["error", "skip"] = "error", cache: str | None = None, eos_tokens: int = 0,
        test: list[str] | None = None, num_workers: int = 0, pack: Literal["cut", "fit"] = "cut",
    ) -> None:  # fmt: skip
        super().__init__(batch_size, seed, num_workers)
        require(pack in ("cut", "fit"), f"pack is {pack!r}; use 'cut' or 'fit'.")
        self.pack = pack
        require(length >= 2, f"length is {length}; rows need at least 2 tokens, so that one can follow another.")
        require(eos_tokens >= 0, f"eos_tokens is {eos_tokens}; it must not be negative.")
        self.eos_tokens = eos_tokens
        of = functools.partial(Documents, column=column, on_bad_line=on_bad_line)
        self.train_documents = of(sources=train, split="train")
        self.validation_documents = of(sources=validation, split="validation")
        self.test_documents = None if test is None else of(sources=test, split="test")
        self._documents = list(filter(None, (self.train_documents, self.validation_documents, self.test_documents)))
        self.tokenizer_path, self.vocab_size = tokenizer, vocab_size
        self.length_asked = self.row_length = length
        self.cache = Path(cache).expanduser() if cache else cache_folder()

    def prepare_data(self) -> None:
        self.setup()  # in one process: the others wait, and find the tokens made

    def check(self) -> None:
        for documents in self._documents:
            documents.check()
        if self.tokenizer_path is not None:
            self._prepare_tokenizer(())

    def load(self) -> None:
        for documents in self._documents:
            documents.check()
        begin = self._prepare_tokenizer(self.train_documents.read(_text_only))
        if self.eos_tokens and self.tokenizer.eos_token_id is None:
            raise ValueError("eos_tokens: the tokenizer has no eos token; set one, or leave eos_tokens at 0.")
        tokens = {x.split: tokenized(x, self.tokenizer, begin, self.cache, self.eos_tokens) for x in self._documents}
        rows = {split: self._cut(found, split) for split, found in tokens.items()}
        self.train_rows, self.validation_rows, self.test_rows = rows["train"], rows["validation"], rows.get("test")

    def _cut(self, tokens: Tokens, split: str) -> Rows:
        try:
            return (cut if self.pack == "cut" else fitted)(tokens, self.row_length)
        except ValueError as error:
            raise ValueError(f"{split}: {error}") from error

    def _prepare_tokenizer(self, texts: Iterable[str]) -> int:
        """Load or train the tokenizer; returns the token that stands before each document."""
        if self.tokenizer_path is None:
            self.tokenizer = train_bpe(texts, self.vocab_size)
        else:
            self.tokenizer = load_tokenizer(self.tokenizer_path)
        for begin in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if begin is not None:
                return int(begin)
        raise ValueError(f"tokenizer: {self.tokenizer_path} has neither a bos nor an eos token to part documents.")


class StdlibData(TextData):
    """The source of this machine's Python standard library, split by file (see `hybrid.training.tasks.stdlib`).

    Args:
        length, vocab_size, tokenizer, batch_size, seed, num_workers: as of `TextData`.
    """

    def __init__(
        self, length: int = 256, vocab_size: int = 2048, tokenizer: str | None = None, batch_size: int = 32,
        seed: int = 0, num_workers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__([], [], tokenizer, length, vocab_size, batch_size, seed, num_workers=num_workers)
        self._documents = []  # they are not files that someone named

    def load(self) -> None:
        self.corpus = load_stdlib()
        splits = self.corpus.train, self.corpus.validation, self.corpus.test
        parts = [[document.text for document in split] for split in splits]
        begin = self._prepare_tokenizer(parts[0])
        encoded = ([encode_document(self.tokenizer, text) for text in texts] for texts in parts)
        self.train_rows, self.validation_rows, self.test_rows = (pack(docs, self.row_length, begin) for docs in encoded)


class SudokuData(HybridData):
    """Sudoku, a puzzle a row; the clues are given and the solution is learned.

    Args:
        count: training puzzles, made on the spot; whole solution grids are held out.
        clues: fewest and most clues of a puzzle.
        batch_size: puzzles a step and process.
        seed: of the puzzles, the held-out grids and the order.
        box: rows and columns of a box: 2, 2 for 4x4 and 2, 3 or 3, 2 for 6x6.
        num_workers: processes that make batches ready; 0 is this one.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, count: int = 50_000, clues: tuple[int, int] = (4, 8), batch_size: int = 128, seed: int = 0,
        box: tuple[int, int] = (2, 2), num_workers: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, seed, num_workers)
        require(count >= 1, f"count is {count}; it must be at least 1.")
        self.count, self.clues, self.sudoku = count, clues, Sudoku(rows=box[0], columns=box[1])

    def load(self) -> None:
        sudoku = self.sudoku
        self.tokenizer = character_tokenizer(sudoku.alphabet)
        train, self.held_out = split_grids(seed=self.seed, sudoku=sudoku)[0], self.test(512, validation=True)
        source = torch.Generator().manual_seed(self.seed)
        puzzles = sample_puzzles(train, self.count, source, self.clues, sudoku)
        self.train_rows, self.validation_rows = map(self._rows, (puzzles, self.held_out))
        self.test_rows = self._rows(self.test(512))

    def test(self, count: int, *, validation: bool = False) -> list[str]:
        """`count` puzzles of held-out grids, for the test or for `validation`: the same whatever there is to train
        on."""
        low, high = self.clues
        return list(_held_out_puzzles(self.sudoku, (low, high), self.seed, count, validation))

    def _rows(self, puzzles: list[str]) -> Rows:
        # All of one length and a token a character: a table does in an instant what the tokenizer takes seconds for.
        table = torch.zeros(128, dtype=torch.int32)
        for character in self.sudoku.alphabet:
            table[ord(character)] = self.tokenizer.convert_tokens_to_ids(character)
        characters = torch.frombuffer(bytearray("".join(puzzles).encode("ascii")), dtype=torch.uint8)
        ids = F.pad(table[characters.long()].view(len(puzzles), -1), (1, 0), value=self.tokenizer.bos_token_id)
        target = torch.zeros_like(ids, dtype=torch.bool)
        target[:, 1 + self.sudoku.prompt_length :] = True
        return Rows(ids, target, torch.zeros_like(ids))


@functools.cache  # for a process with more than one job, or that asks the model afterwards
def _held_out_puzzles(
    sudoku: Sudoku, clues: tuple[int, int], seed: int, count: int, validation: bool
) -> tuple[str, ...]:  # fmt: skip
    grids = split_grids(seed=seed, sudoku=sudoku)[1]
    source = torch.Generator().manual_seed(seed + (1 if validation else 2))
    return tuple(sample_puzzles(grids, count, source, clues, sudoku))


def _text_only(document: str | Chat) -> str:
    if isinstance(document, str):
        return document
    raise ValueError("tokenizer: conversations need that of a chat model, with its chat template: give a name.")
