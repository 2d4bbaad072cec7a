"""Where training text comes from: files, rows of tables, and whatever the `datasets` library knows.

A document is a text, or a conversation: a list of messages with a role and a content. A source is a string:

    texts/*.txt                                       files or patterns; each file is one document
    logs/**/*.jsonl, tables/*.parquet                 the same; each line or row is one document
    tables/*.csv, *.tsv, *.json                       tables whose first line names the columns; a list of objects, or
                                                      one, or one a line
    datasets://NAME?name=CONFIG&split=train           a dataset, on the hub or a folder here; `streaming=true` does not
                                                      download it first, and `take=1000` stops after so many rows
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

from hybrid.common.checks import check_choices, require
from hybrid.common.files import BadLine, json_of, real_text, utf8

Chat = list[dict[str, str]]
HOW_TO_INSTALL = "pip install 'hybrid-lm[data]'"
_DATASET = "datasets://"

Rows = Iterator[tuple[str, Any]]  # the place of each in words, and what stands there, or why it cannot be read


@dataclass(kw_only=True)
class Documents:
    """The documents of some sources, in their order, as often as one likes.

    Attributes:
        sources: see the top of this file.
        split: what messages call them: "train" or "validation".
        column: of a line or row: where its text is. Without it, `messages` may hold a conversation.
        on_bad_line: "error", or "skip" to leave out what cannot be used and count it.
        skipped: what was left out when they were last read, in words.
    """

    sources: list[str]
    split: str
    column: str = "text"
    on_bad_line: Literal["error", "skip"] = "error"
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choices(self)

    def key(self) -> str:
        """Changes with the content of the sources. Of a streamed dataset, only the name is known beforehand."""
        found = hashlib.sha256(f"{self.column} {self.on_bad_line}".encode())
        for source in self.sources:
            if source.startswith(_DATASET):
                rows = _open_dataset(source, self.split)
                found.update(f"{source} {getattr(rows, '_fingerprint', None)}".encode())
                continue
            for file in _files(source, self.split):
                with file.open("rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
                found.update(f"{_kind(file)} {digest}".encode())
        return found.hexdigest()

    def check(self) -> None:
        """Raise ValueError if a source is not there, or needs what is not installed; before any long work."""
        require(bool(self.sources), f"{self.split}: no files given; pass file names or patterns like 'texts/*.txt'.")
        for source in self.sources:
            if source.startswith(_DATASET):
                _open_dataset(source, self.split)
            elif any(_kind(file) == ".parquet" for file in _files(source, self.split)):
                _parquet()

    def read(self, use: Callable[[str | Chat], Any]) -> Iterator[Any]:
        """What `use` makes of each document; it may raise BadLine as well.

        Raises:
            ValueError: a source is not there, or a document is not as it should be and on_bad_line is "error".
        """
        self.skipped = []
        for source in self.sources:
            for where, row in self._rows(source):
                try:
                    found = use(self._document(row))
                except BadLine as error:
                    said = f"{self.split}: {where} {error}"
                    if self.on_bad_line == "error":
                        raise ValueError(f"{said}. Mend it, or set on_bad_line='skip'.") from error
                    self.skipped.append(said)
                else:
                    yield found

    def _rows(self, source: str) -> Rows:
        if source.startswith(_DATASET):
            for number, row in enumerate(_open_dataset(source, self.split)):
                yield f"{source} row {number}", row
            return
        for file in _files(source, self.split):
            if (reader := READERS.get(_kind(file))) is None:
                yield str(file), _read(lambda raw: {self.column: utf8(raw)}, file.read_bytes())
            else:
                yield from ((f"{file} {where}".rstrip(), row) for where, row in reader(file))

    def _document(self, row: Any) -> str | Chat:
        if isinstance(row, BadLine):
            raise row
        if not isinstance(row, dict):
            raise BadLine("is not an object with fields")
        value = row.get(self.column)
        if value is None and self.column == "text":
            value = row.get("messages")
        if isinstance(value, str):
            return real_text(value)
        if not isinstance(value, list) or not value:
            raise BadLine(f"has no text or messages in {self.column!r}; it has {', '.join(map(str, row)) or 'nothing'}")
        for message in value:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise BadLine("has a message without a role or without a content that is text")
            real_text(message["role"] + message["content"])
        return value


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    return {".ndjson": ".jsonl"}.get(suffix, suffix)


def _files(pattern: str, split: str) -> list[Path]:
    path = Path(pattern).expanduser()
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    found = sorted(anchor.glob(str(path.relative_to(path.anchor)))) if path.name else []
    files = [f for f in found if f.is_file()]
    require(bool(files), f"{split}: {pattern!r} matches no file; is the path right, seen from {Path.cwd()}?")
    return files


def _read(reader: Callable[[bytes], Any], raw: bytes) -> Any:
    """What is read, or why it cannot be."""
    try:
        return reader(raw)
    except BadLine as error:
        return error


def _of_lines(lines: Iterable[bytes]) -> Rows:
    return ((f"line {number}", _read(json_of, line)) for number, line in enumerate(lines, 1) if line.strip())


def _of_jsonl(file: Path) -> Rows:
    with file.open("rb") as lines:
        yield from _of_lines(lines)


def _of_json(file: Path) -> Rows:
    raw = file.read_bytes()
    found = _read(json_of, raw)
    cause = found.__cause__ if isinstance(found, BadLine) else None
    if isinstance(cause, json.JSONDecodeError) and "Extra data" in cause.msg:
        yield from _of_lines(raw.splitlines())
    elif isinstance(found, BadLine):
        yield "", found
    else:
        yield from ((f"row {n}", row) for n, row in enumerate(found if isinstance(found, list) else [found]))


def _of_table(file: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # a text is one field
    # What is no text goes through as surrogates, so that it is a fault of its row and not of the file.
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if _kind(file) == ".tsv" else ",", strict=True)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"line {rows.line_num + 1}", BadLine(f"cannot be read ({error})")
                continue
            uneven = None in row or None in row.values()
            yield f"line {rows.line_num}", (
                BadLine("has not as many fields as the first line has names") if uneven else row
            )


def _of_parquet(file: Path) -> Rows:
    parts = _parquet().ParquetFile(file).iter_batches(batch_size=1000)
    return ((f"row {n}", row) for n, row in enumerate(row for part in parts for row in part.to_pylist()))


# Any other file is one text.
READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": _of_table, ".json": _of_json, ".jsonl": _of_jsonl, ".parquet": _of_parquet, ".tsv": _of_table,
}  # fmt: skip


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading parquet files needs pyarrow: {HOW_TO_INSTALL}") from error
    return pyarrow.parquet


def _open_dataset(source: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{split}: {source} needs the datasets library: {HOW_TO_INSTALL}") from error
    path, _, query = source.removeprefix(_DATASET).partition("?")
    chosen = dict(parse_qsl(query))
    take, part, streaming = chosen.pop("take", None), chosen.pop("split", None), chosen.pop("streaming", "false")
    if unknown := chosen.keys() - {"name", "revision", "data_dir"}:
        raise ValueError(f"{split}: {source} has {', '.join(sorted(unknown))}; known: name revision data_dir split "
                         "streaming take.")  # fmt: skip
    try:
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(path)
            rows = rows[part or "train"] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(path, split=part or "train", streaming=streaming == "true", **chosen)
    except Exception as error:  # the library's own, of many kinds
        raise ValueError(f"{split}: {source} could not be opened: {error}") from error
    return rows if take is None else rows.take(int(take))
