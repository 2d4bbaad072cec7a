"""The text corpus: the source of the running Python's own standard library.

It is on every machine that can run this package, needs no download, and is about 9 MB of careful code and
prose under one licence (PSF-2.0). It differs a little from one Python version to the next: name the version
beside any number measured on it.

A corpus of one project repeats itself, so a file held out from training is not by that alone unseen. Two
things are done about it. A held-out file that is a near-copy of any other file is moved to training, and what
still overlaps afterwards is measured and printed with the corpus (`Corpus.summary`).
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Characters, without the indentation. Shorter lines are mostly idiom that any two Python files share
# (`def __init__(self, *args):`); longer ones mostly say something of their own.
LONG_LINE = 35
NEAR_COPY = 0.5  # share of its long lines that a held-out file may have in common with one other file
HELD_OUT = {"validation": (0.90, 0.95), "test": (0.95, 1.00)}  # ranges of the name's hash; the rest trains

# Test suites repeat what they test; `encodings` is tables, mostly near-copies; `pydoc_data` is generated.
_LEFT_OUT_FOLDERS = {
    "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__", "site-packages", "dist-packages",
}  # fmt: skip
# Written by whoever built or set up this Python: not part of the library, different on every machine.
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize.", "usercustomize.")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One source file. `name` is its path below the library's folder, with forward slashes."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in three disjoint splits, each ordered by name.

    `overlap` is the share (0 to 1) of the long lines of a split, counted with repetition, that stand verbatim
    (indentation aside) anywhere in training: "validation" and "test", and, for the split by hash alone,
    "naive_validation" and "naive_test". `moved` counts the near-copies that went from those two to training.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    overlap: dict[str, float]
    moved: int

    def summary(self) -> str:
        """Two lines for people: the size of each split, and how much of the held-out text is in training."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        sizes = ", ".join(
            f"{split} {len(documents)} files {sum(len(d.text.encode()) for d in documents):,} bytes"
            for split, documents in splits.items()
        )
        shares = ", ".join(
            f"{split} {self.overlap[split]:.1%} (naive split {self.overlap['naive_' + split]:.1%})"
            for split in HELD_OUT
        )
        return f"{sizes}\nlong lines also in training: {shares}; near-copies moved to train: {self.moved}"


def load_stdlib(root: Path | None = None) -> Corpus:
    """Reads the standard library below `root` (default: the running Python's) and splits it by file.

    The split depends on the files' names and texts only: same library, same corpus, on any machine. Raises
    ValueError if `root` holds no Python source, as where Python was shipped as a zip file or without it.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    documents = _read(root)
    if not documents:
        raise ValueError(
            f"no Python source below {str(root)!r}, where the standard library's .py files were looked for: "
            "they are missing, zipped or compiled away. Use an ordinary CPython installation, or pass root=, "
            "the folder of another one's library."
        )
    naive = {d.name: split_of(d.name) for d in documents}
    lines = {d.name: _long_lines(d.text) for d in documents}
    copies = _near_copies(lines, (name for name, split in naive.items() if split != "train"))
    final = naive | dict.fromkeys(copies, "train")

    members = {split: tuple(d for d in documents if final[d.name] == split) for split in ("train", *HELD_OUT)}
    overlap = _overlap(lines, final) | {f"naive_{k}": v for k, v in _overlap(lines, naive).items()}
    return Corpus(**members, overlap=overlap, moved=len(copies))


def split_of(name: str) -> str:
    """Where the hash of a document's name alone puts it: "train", "validation" or "test"."""
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next((split for split, (low, high) in HELD_OUT.items() if low <= fraction < high), "train")


def _read(root: Path) -> list[Document]:
    documents = []
    for folder, folders, files in os.walk(root):
        # In place, so that the walk does not enter them: site-packages can be larger than the library.
        folders[:] = [
            f for f in folders if f not in _LEFT_OUT_FOLDERS and not f.startswith(_LEFT_OUT_PREFIXES)
        ]
        for file in files:
            if not file.endswith(".py") or file.startswith(_LEFT_OUT_PREFIXES):
                continue
            path = Path(folder, file)
            try:
                with tokenize.open(path) as source:  # honours a coding cookie
                    text = source.read()
            except (SyntaxError, UnicodeDecodeError):
                continue
            if text.strip():
                documents.append(Document(name=path.relative_to(root).as_posix(), text=text))
    return sorted(documents, key=lambda d: d.name)


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]


def _near_copies(lines: dict[str, list[str]], names: Iterable[str]) -> list[str]:
    """Those of `names` that share more than NEAR_COPY of their long lines with any one other file."""
    holders: dict[str, list[str]] = defaultdict(list)
    for name, own in lines.items():
        for line in set(own):
            holders[line].append(name)

    copies = []
    for name in names:
        shared = Counter(other for line in lines[name] for other in holders[line] if other != name)
        if max(shared.values(), default=0) > NEAR_COPY * len(lines[name]):
            copies.append(name)
    return copies


def _overlap(lines: dict[str, list[str]], splits: dict[str, str]) -> dict[str, float]:
    """For each held-out split the share of its long lines that training holds too; 0 where it has none."""
    seen = {line for name, own in lines.items() if splits[name] == "train" for line in own}
    overlap = {}
    for split in HELD_OUT:
        held_out = [line for name, own in lines.items() if splits[name] == split for line in own]
        overlap[split] = sum(line in seen for line in held_out) / max(1, len(held_out))
    return overlap
