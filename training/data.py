"""Data for training: tokens in rows of one length, read as one long shuffled stream.

A sample's number in that stream is all that decides what it is and which noise it gets, so a job can be split
over processes, or go on where it stopped, and see the same data.

Shapes: N rows of T tokens.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hybrid.training.objective import Batch
from hybrid.training.stdlib import Document, load_stdlib
from hybrid.training.sudoku import ALPHABET, sample_puzzles, split_grids
from hybrid.training.tokenizers import character_tokenizer, encode_document, train_bpe


class Rows(Dataset[Batch]):
    """N rows, read `passes` times over, each time in another order (or in their own, without a seed), from sample
    number `start` of that stream on."""

    def __init__(
        self, ids: Tensor, target: Tensor, doc: Tensor, *,
        passes: int = 1, shuffle_seed: int | None = None, start: int = 0,
    ) -> None:  # fmt: skip
        self.ids, self.target, self.doc = ids, target, doc
        self.passes, self.shuffle_seed, self.start = passes, shuffle_seed, start
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.ids) * self.passes - self.start

    def __getitems__(self, numbers: list[int]) -> Batch:
        """One batch: the samples with these numbers in the stream."""
        numbers = [self.start + n for n in numbers]
        rows = torch.tensor([self._row(n) for n in numbers])
        return Batch(
            input_ids=self.ids[rows].long(), target=self.target[rows], doc=self.doc[rows].long(),
            index=torch.tensor(numbers),
        )  # fmt: skip

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self.ids))
        if self.shuffle_seed is None:
            return place
        if self._order[0] != epoch:
            source = torch.Generator().manual_seed(self.shuffle_seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.ids), generator=source)
        return int(self._order[1][place])


def pack(documents: Iterable[Sequence[int]], length: int, begin: int, *, keep_apart: bool = True) -> Rows:
    """Documents, each behind a `begin` token, laid end to end and cut into rows of `length`.

    Documents in one row do not see one another, unless `keep_apart` is off. The last, short row is dropped.

    Raises:
        ValueError: there is less text than one row.
    """
    ids, doc = [], []
    for number, document in enumerate(documents):
        ids.append(torch.tensor([begin, *document], dtype=torch.int32))
        doc.append(torch.full((len(document) + 1,), number if keep_apart else 0, dtype=torch.int32))
    whole = sum(len(x) for x in ids) // length
    if not whole:
        raise ValueError(
            f"the text has {sum(len(x) for x in ids)} tokens, less than one row of {length}: give more text, or a "
            "smaller length."
        )
    flat, labels = (torch.cat(x)[: whole * length].view(whole, length) for x in (ids, doc))
    labels = labels - labels[:, :1]
    return Rows(flat, torch.ones_like(flat, dtype=torch.bool), labels)


class HybridData(L.LightningDataModule):
    """What the training job asks of its data: a tokenizer, and rows for training and validation.

    Subclasses set `tokenizer`, `train_rows` and `validation_rows` in `load`.
    """

    tokenizer: PreTrainedTokenizerBase
    train_rows: Rows
    validation_rows: Rows

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.batch_size, self.seed = batch_size, seed
        self._loaded = False

    def load(self) -> None:
        raise TypeError(f"{type(self).__name__} must define load().")

    def setup(self, stage: str | None = None) -> None:
        if not self._loaded:
            self.load()
            self._loaded = True

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.train_rows.ids.shape[1]

    def train_dataloader(self) -> DataLoader[Batch]:
        rows, trainer = self.train_rows, self.trainer
        passes, done = 1_000_000, 0  # the clock ends the job, unless the trainer counts steps
        if trainer is not None:
            a_step = trainer.accumulate_grad_batches * self.batch_size * trainer.world_size
            # A resumed job has taken its steps: the stream goes on where they end.
            done = trainer.global_step * a_step
            if trainer.max_steps > 0:
                passes = -(-trainer.max_steps * a_step // len(rows.ids))
        passes += -(-done // len(rows.ids))
        stream = Rows(rows.ids, rows.target, rows.doc, passes=passes, shuffle_seed=self.seed, start=done)
        return DataLoader(stream, batch_size=self.batch_size, collate_fn=_as_is, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.validation_rows, batch_size=self.batch_size, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch  # `Rows` gives whole batches


class TextData(HybridData):
    """Plain text files, tokenised and packed.

    Args:
        train: files or glob patterns, a document a file.
        validation: the same, held out.
        tokenizer: a folder or hub name; None trains a byte-level BPE on the training files.
        length: tokens a row.
        vocab_size: of the tokenizer to be trained.
        batch_size: rows a step and process.
        seed: of the order of the rows.

    Raises:
        ValueError: a pattern matches no file, or the text is shorter than one row.
    """

    def __init__(
        self, train: list[str], validation: list[str], tokenizer: str | None = None, length: int = 256,
        vocab_size: int = 2048, batch_size: int = 32, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, seed)
        self.files = {"train": train, "validation": validation}
        self.tokenizer_path, self.row_length, self.vocab_size = tokenizer, length, vocab_size

    def load(self) -> None:
        self._load_texts(_read(self.files["train"], "train"), _read(self.files["validation"], "validation"))

    def _load_texts(self, train: list[str], validation: list[str]) -> None:
        if self.tokenizer_path is None:
            self.tokenizer = train_bpe(train, self.vocab_size)
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_path)
        begin = self.tokenizer.bos_token_id
        if begin is None:
            begin = self.tokenizer.eos_token_id
        if begin is None:
            raise ValueError(f"tokenizer: {self.tokenizer_path} has neither a bos nor an eos token to part documents.")
        encoded = ([encode_document(self.tokenizer, text) for text in texts] for texts in (train, validation))
        self.train_rows, self.validation_rows = (pack(docs, self.row_length, int(begin)) for docs in encoded)


class StdlibData(TextData):
    """The source of this machine's Python standard library, split by file (see `hybrid.training.stdlib`)."""

    def __init__(
        self, length: int = 256, vocab_size: int = 2048, tokenizer: str | None = None, batch_size: int = 32,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__([], [], tokenizer, length, vocab_size, batch_size, seed)

    def load(self) -> None:
        self.corpus = load_stdlib()
        self._load_texts(_texts(self.corpus.train), _texts(self.corpus.validation))


class SudokuData(HybridData):
    """4x4 sudoku, a puzzle a row; the clues are given and the solution is learned.

    Args:
        count: training puzzles, made on the spot; whole solution grids are held out.
        clues: fewest and most clues of a puzzle.
        batch_size: puzzles a step and process.
        seed: of the puzzles, the held-out grids and the order.
    """

    def __init__(
        self, count: int = 50_000, clues: tuple[int, int] = (4, 8), batch_size: int = 128, seed: int = 0
    ) -> None:
        super().__init__(batch_size, seed)
        self.count, self.clues = count, clues

    def load(self) -> None:
        self.tokenizer = character_tokenizer(ALPHABET)
        train, held_out = split_grids(seed=self.seed)
        source = torch.Generator().manual_seed(self.seed)
        self.train_rows = self._rows(sample_puzzles(train, self.count, source, self.clues))
        self.held_out = sample_puzzles(held_out, 512, source, self.clues)
        self.validation_rows = self._rows(self.held_out)

    def _rows(self, puzzles: list[str]) -> Rows:
        begin = self.tokenizer.bos_token_id
        ids = torch.tensor([[begin, *self.tokenizer.encode(puzzle)] for puzzle in puzzles], dtype=torch.int32)
        target = torch.zeros_like(ids, dtype=torch.bool)
        target[:, ids[0].tolist().index(self.tokenizer.convert_tokens_to_ids("=")) + 1 :] = True
        return Rows(ids, target, torch.zeros_like(ids))


def _texts(documents: Iterable[Document]) -> list[str]:
    return [document.text for document in documents]


def _read(patterns: list[str], split: Literal["train", "validation"]) -> list[str]:
    texts = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(anchor.glob(str(path.relative_to(path.anchor)))) if path.name else []
        files = [f for f in found if f.is_file()]
        if not files:
            raise ValueError(f"{split}: {pattern!r} matches no file; is the path right, seen from {Path.cwd()}?")
        for file in files:
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                reason = f"{error.reason} at byte {error.start}"
                raise ValueError(f"{split}: {file} is not UTF-8 text ({reason}).") from error
    if not texts:
        raise ValueError(f"{split}: no files given; pass file names or patterns like 'texts/*.txt'.")
    return texts
