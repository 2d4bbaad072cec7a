"""Documents as tokens on the disk, made once and then read through a memory map.

Shapes: n tokens in all, documents end to end, each behind a begin token.
"""

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrid.common.files import BadLine
from hybrid.texts import encode_document
from hybrid.training.text.chat import encode_chat
from hybrid.training.text.documents import Chat, Documents

_FORMAT = 3  # of the files; a change makes new ones
_FILES = {"ids": np.int32, "doc": np.int32, "target": np.bool_}


@dataclass(frozen=True)
class Tokens:
    """ids int32, doc int32 (the number of the document) and target bool (to be learned), all `[n]`, on the disk."""

    ids: Tensor
    doc: Tensor
    target: Tensor


def tokenized(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, begin: int, folder: Path, eos_tokens: int = 0
) -> Tokens:
    """The tokens of `documents`, each with `eos_tokens` EOS tokens behind it; from `folder` if they were made before,
    with the same content and tokenizer.

    Raises:
        ValueError: a document cannot be used, see `Documents.read`.
    """
    tail = [int(tokenizer.eos_token_id)] * eos_tokens if eos_tokens else []
    words = f"{_FORMAT} {documents.key()} {tokenizer_key(tokenizer)} {begin}{tail or ''}"
    key = hashlib.sha256(words.encode()).hexdigest()[:32]
    place = folder / f"tokens-{key}"
    if not (place / "about.json").exists():
        new = folder / f".tokens-{key}.{os.getpid()}"  # two jobs may make the same
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            _write(documents, tokenizer, begin, tail, new)
            if not (place / "about.json").exists():
                shutil.rmtree(place, ignore_errors=True)
                new.rename(place)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    skipped = json.loads((place / "about.json").read_text())["skipped"]
    documents.skipped = skipped
    if skipped and not (place / "ids").stat().st_size:
        raise ValueError(f"{documents.split}: all {len(skipped)} documents were skipped; the first: {skipped[0]}")
    if skipped:
        warnings.warn(f"{len(skipped)} documents were skipped, the first: {skipped[0]}", stacklevel=2)
    return Tokens(**{name: _mapped(place / name, kind) for name, kind in _FILES.items()})


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with anything that decides what a tokenizer makes of a document."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{type(tokenizer).__name__}{words}{special}{tokenizer.chat_template}".encode()).hexdigest()


def _write(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, begin: int, tail: list[int], folder: Path
) -> None:
    def encode(document: str | Chat) -> tuple[list[int], list[bool]]:
        if isinstance(document, str):
            try:
                ids = encode_document(tokenizer, document)
            except ValueError as error:
                raise BadLine(f"cannot be written: {error}") from error
            target = [True] * len(ids)
        else:
            ids, target = encode_chat(tokenizer, document)
        return ids + tail, target + [True] * len(tail)

    files = {name: (folder / name).open("wb") for name in _FILES}
    tokens = 0
    try:
        for number, (ids, target) in enumerate(_shown(documents.read(encode), documents.split)):
            if ids[:1] == [begin]:  # some chat templates write it themselves
                ids, target = ids[1:], target[1:]
            columns = {"ids": [begin, *ids], "doc": [number] * (len(ids) + 1), "target": [bool(all(target)), *target]}
            for name, kind in _FILES.items():
                files[name].write(np.asarray(columns[name], dtype=kind).tobytes())
            tokens += len(ids) + 1
    finally:
        for file in files.values():
            file.close()
    about = {"tokens": tokens, "skipped": documents.skipped}
    (folder / "about.json").write_text(json.dumps(about))


def _shown(encoded: Iterable[Any], split: str) -> Iterable[Any]:
    """The same, with a line that says how far it is."""
    console = Console(file=sys.stderr)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task, tokens = bar.add_task(f"tokenising {split}", total=None), 0
        for number, document in enumerate(encoded, 1):
            tokens += len(document[0]) + 1
            if number % 100 == 0:
                bar.update(task, description=f"tokenising {split}: {number:,} documents, {tokens:,} tokens")
            yield document


def _mapped(file: Path, kind: type) -> Tensor:
    if not file.stat().st_size:
        return torch.from_numpy(np.empty(0, kind))
    # Copy on write, because PyTorch has no tensors that cannot be written; nothing writes.
    return torch.from_numpy(np.memmap(file, dtype=kind, mode="c"))
