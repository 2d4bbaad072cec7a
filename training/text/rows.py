"""Tokens in rows of one length, read as one long shuffled stream.

A sample's number in that stream is all that decides what it is and which noise it gets, so a job can be split
over processes, or go on where it stopped, and see the same data.

Shapes: N rows of T tokens.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from hybrid.common.checks import require
from hybrid.texts import encode_behind, encode_document
from hybrid.training.batch import Batch
from hybrid.training.text.token_cache import Tokens

NOBODY = -1  # the number of a row that is there so that a batch is full, and counts for nothing


class Rows(Dataset[Batch]):
    """N rows, read over and over, each time in another order (or in their own, without a seed). `ids` int32, `target`
    bool and `doc` int32 are `[N, T]`."""

    def __init__(self, ids: Tensor, target: Tensor, doc: Tensor, *, shuffle_seed: int | None = None) -> None:
        self.ids, self.target, self.doc, self.shuffle_seed = ids, target, doc, shuffle_seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def shuffled(self, seed: int) -> "Rows":
        """The same rows in the orders of a seed."""
        return type(self)(self.ids, self.target, self.doc, shuffle_seed=seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, numbers: list[int]) -> Batch:
        """One batch: the samples with these numbers in the stream, which has no end."""
        rows, index = torch.tensor([self._row(n) for n in numbers]), torch.tensor(numbers)
        return Batch(
            input_ids=self.ids[rows].long(), target=self.target[rows] & (index != NOBODY)[:, None],
            doc=self.doc[rows].long(), index=index,
        )  # fmt: skip

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self.ids))
        if self.shuffle_seed is None:
            return place
        if self._order[0] != epoch:
            source = torch.Generator().manual_seed(self.shuffle_seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.ids), generator=source)
        return int(self._order[1][place])


class InTurn(DistributedSampler[int]):
    """The numbers of the samples that one of several processes reads: they take them in turn, so that the next batches
    of all are the next samples of the stream. (Lightning leaves samplers of this kind alone.)

    Args:
        count: of the process's samples in an epoch; None reads each of the rows once, and what is missing for equally
            many in each process is `NOBODY`.
        begin: where the stream goes on, asked at the start of each epoch.
    """

    def __init__(
        self, rows: Rows, processes: int, process: int, count: int | None = None,
        begin: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        super().__init__(rows, processes, process, shuffle=False)
        self.begin, self.once = begin, count is None
        self.num_samples = -(-len(rows) // processes) if count is None else count

    def __iter__(self) -> Iterator[int]:
        begin = self.begin()
        for turn in range(self.num_samples):
            number = begin + turn * self.num_replicas + self.rank
            yield number if not self.once or number < len(self.dataset) else NOBODY  # type: ignore[arg-type]


class PackedRows(Rows):
    """Rows whose documents are numbered through all of them, so that `doc` can stay on the disk as it is."""

    def __getitems__(self, numbers: list[int]) -> Batch:
        batch = super().__getitems__(numbers)
        batch["doc"] -= batch["doc"][:, :1].clone()
        return batch


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
    flat, labels = (torch.cat(x) if x else torch.empty(0, dtype=torch.int32) for x in (ids, doc))
    rows = cut(Tokens(flat, labels, torch.ones_like(flat, dtype=torch.bool)), length)
    return Rows(rows.ids, rows.target, rows.doc - rows.doc[:, :1])


def cut(tokens: Tokens, length: int) -> PackedRows:
    """Rows of `length` tokens, on the disk if the tokens are. The last, short row is dropped, and so are rows in which
    there is nothing to learn, because a conversation's prompt fills them.

    Raises:
        ValueError: there is less text than one row, or nothing to learn.
    """
    whole = len(tokens.ids) // length
    if not whole:
        raise ValueError(
            f"the text has {len(tokens.ids)} tokens, less than one row of {length}: give more text, or a smaller "
            "length."
        )
    ids, target, doc = (x[: whole * length].view(whole, length) for x in (tokens.ids, tokens.target, tokens.doc))
    useful = target[:, 1:].any(1)
    if not useful.any():
        raise ValueError("no row has anything to learn: responses begin behind their row's end; make rows longer.")
    if not useful.all():
        ids, target, doc = ids[useful], target[useful], doc[useful]
    return PackedRows(ids, target, doc)


def fitted(tokens: Tokens, length: int) -> Rows:
    """Rows of `length` tokens in which no document is cut that fits into one: the longest first, each into the row with
    the least room that has enough (best fit, arXiv 2404.10830). What is left of a row is padding.

    Raises:
        ValueError: there is nothing to learn.
    """
    new = torch.ones(len(tokens.doc), dtype=torch.bool)
    new[1:] = tokens.doc[1:] != tokens.doc[:-1]
    begins = [*new.nonzero()[:, 0].tolist(), len(tokens.doc)]
    spans = itertools.pairwise(begins)
    parts = [(at, min(length, end - at)) for start, end in spans for at in range(start, end, length)]
    parts = [(at, size) for at, size in parts if tokens.target[at + 1 : at + size].any()]
    require(bool(parts), "there is nothing to learn: give more text, or make rows longer.")
    rows = _best_fit(parts, length)
    ids = torch.zeros(len(rows), length, dtype=torch.int32)
    target, doc = torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, -1)
    for row, inside in enumerate(rows):
        place = 0
        for number, (at, size) in enumerate(inside):
            here, there = slice(place, place + size), slice(at, at + size)
            ids[row, here], target[row, here], doc[row, here] = tokens.ids[there], tokens.target[there], number
            place += size
    return Rows(ids, target, doc)


def _best_fit(parts: list[tuple[int, int]], length: int) -> list[list[tuple[int, int]]]:
    """Parts, (place, size) each, shared out among rows that have room for `length`."""
    rows: list[list[tuple[int, int]]] = []
    by_room: dict[int, list[int]] = {}  # rows that are not full
    rooms: list[int] = []  # in order
    for part in sorted(parts, key=lambda part: (-part[1], part[0])):
        least = bisect.bisect_left(rooms, part[1])
        room, row = length, len(rows)
        if least < len(rooms):
            room = rooms[least]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[least]
        else:
            rows.append([])
        rows[row].append(part)
        if left := room - part[1]:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    return rows


def answer_rows(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], answer_length: int | None = None
) -> Rows:
    """A row for each pair of prompt and answer: begin token, prompt, answer; only the answer is learned.

    With an `answer_length`, answers of different lengths are filled up to it with the end token, which is learned too:
    decoding opens that many slots, and a model has to know which of them stay empty. Shorter rows are padded.

    Raises:
        ValueError: an answer is longer than `answer_length`.
    """
    encoded = [
        (encode_document(tokenizer, prompt, "a prompt"), encode_behind(tokenizer, answer, "an answer"))
        for prompt, answer in pairs
    ]  # fmt: skip
    longest = max((len(answer) for _, answer in encoded), default=0)
    if answer_length is not None and longest > answer_length:
        raise ValueError(f"answer_length is {answer_length}, and the longest answer has {longest} tokens: raise it.")
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    filled = [([begin, *prompt], answer + [end] * ((answer_length or 0) - len(answer))) for prompt, answer in encoded]
    return Rows(*given_and_learned(filled, pad))


def given_and_learned(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """`ids`, `target` and `doc` of `Rows`, a row for each pair: what is given and, behind it, what is learned. Shorter
    rows are padded."""
    length = max((len(given) + len(learned) for given, learned in pairs), default=2)
    ids = torch.full((len(pairs), length), pad, dtype=torch.int32)
    target, doc = torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, -1)
    for row, (given, learned) in enumerate(pairs):
        start, end = len(given), len(given) + len(learned)
        ids[row, :end] = torch.tensor([*given, *learned])
        target[row, start:end], doc[row, :end] = True, 0
    return ids, target, doc
