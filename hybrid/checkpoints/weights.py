"""A checkpoint's weights that are not in memory: each is read, and computed where it must be, when it is asked for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid.checkpoints.tensorfile import WEIGHTS, Entry, Header, bytes_of, payload, read_tensor

Chunks = Iterable[bytes | memoryview]


class Part(NamedTuple):
    """Weights by new names, made of those by old ones: `make` takes and gives them in that order, and works on what has
    a shape alone (`meta`) too. None: the same weight by another name."""

    new: tuple[str, ...]
    old: tuple[str, ...]
    make: Callable[..., Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class Weights:
    """Weights by name.

    Attributes:
        tensors: dtype and shape of each.
        read: the one of that name, in memory of its own.
        chunks: its bytes.
    """

    tensors: Mapping[str, Entry]
    read: Callable[[str], Tensor]
    chunks: Callable[[str], Chunks]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Weights":
        """Those that are in memory after all."""
        return cls.computed({name: Entry.of(tensor) for name, tensor in tensors.items()}, tensors.__getitem__)

    @classmethod
    def computed(cls, tensors: Mapping[str, Entry], read: Callable[[str], Tensor]) -> "Weights":
        """Those of which nothing lies anywhere as it is read."""
        return cls(tensors, read, lambda name: bytes_of(read(name)))

    @classmethod
    def in_files(cls, headers: Iterable[Header]) -> "Weights":
        """All that are in these files."""
        where = {name: header for header in headers for name in header.tensors}
        return cls(
            {name: header.tensors[name] for name, header in where.items()},
            lambda name: read_tensor(where[name], name), lambda name: payload(where[name], name),
        )  # fmt: skip

    def made(self, parts: Iterable[Part]) -> "Weights":
        """The same under other names, some computed: anew for each weight that is asked for, so that no more than one
        part is in memory."""
        where = {name: (part, i) for part in parts for i, name in enumerate(part.new)}
        tensors: dict[str, Entry] = {}
        for name, (part, _) in where.items():
            if part.make is None:
                tensors[name] = self.tensors[part.old[0]]
            elif name not in tensors:
                entries = [self.tensors[old] for old in part.old]
                like = [torch.empty(x.shape, dtype=WEIGHTS[x.dtype], device="meta") for x in entries]
                tensors |= zip(part.new, map(Entry.of, part.make(*like)), strict=True)

        def read(name: str) -> Tensor:
            part, i = where[name]
            found = [self.read(old) for old in part.old]
            if part.make is None:
                return found[0]
            return part.make(*found)[i].clone(memory_format=torch.contiguous_format)  # and lets go of the rest

        def chunks(name: str) -> Chunks:
            part, _ = where[name]
            return self.chunks(part.old[0]) if part.make is None else bytes_of(read(name))

        return Weights(tensors, read, chunks)

    def with_rows(self, rows: int, names: Iterable[str]) -> "Weights":
        """For a vocabulary of so many, which `names` have rows for. Each new row, in and out, is the mean of those that
        were there: its logit is then the mean of theirs, and its embedding lies where embeddings lie. No other row
        changes."""
        wide = {
            name: replace(self.tensors[name], shape=(rows, *self.tensors[name].shape[1:]))
            for name in names if name in self.tensors and self.tensors[name].shape[0] < rows
        }  # fmt: skip

        def chunks(name: str) -> Chunks:
            if name not in wide:
                yield from self.chunks(name)
                return
            weight = self.read(name)
            mean = sum(part.double().sum(0) for part in weight.split(1024)) / len(weight)
            yield from bytes_of(weight)
            yield from bytes_of(mean.to(weight.dtype).expand(rows - len(weight), -1))

        return replace(self, tensors={**self.tensors, **wide}, chunks=chunks)

    def unread(self) -> "dict[str, Unread]":
        """As transformers takes weights that it reads when it needs them."""
        return {name: Unread(partial(self.read, name)) for name in self.tensors}


class Unread:
    """Stands for a weight, as a slice of a safetensors file does: `[...]` reads it."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self.read = read

    def __getitem__(self, _all: object) -> Tensor:
        return self.read()
