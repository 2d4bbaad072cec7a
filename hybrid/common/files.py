"""Files that are whole whatever happens: written beside and renamed, or appended line by line; and where caches lie.

A file is written beside the one it is for, forced onto the disk, and only then takes its name: whoever looks, after a
kill or a power cut too, finds the old one or the new one. The copy must lie in the same folder. From another file
system, as the system's temporary folder often is, moving it is copying it, which can stop half-way.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

CACHE_VARIABLES = ("HYBRID_CACHE", "XDG_CACHE_HOME", "HOME")  # what says where the cache lies


class BadLine(ValueError):
    """What a file holds cannot be used; the message goes on from "line 7 of it"."""


class SaveError(OSError):
    """Something could not be saved; what was saved before is as it was."""


def save_error(path: Path, error: BaseException) -> SaveError:
    """What to tell of `path`, which could not be written because of `error`."""
    reason: BaseException | None = error
    while reason is not None and not (isinstance(reason, OSError) and reason.strerror):
        reason = reason.__cause__ or reason.__context__
    why = reason.strerror if isinstance(reason, OSError) else str(error)
    kept = "what was saved there before is intact" if path.exists() else "nothing was saved there before"
    return SaveError(f"{path} could not be written ({why}); {kept}. Make room, or choose another folder, and resume.")


@contextmanager
def replacing(path: Path, alone: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when all went well; its folder is made.

    Args:
        alone: nobody else writes this file at the same time: attempts share one name, so that the next one overwrites
            what a kill left behind.

    Raises:
        SaveError: it could not be written; `path` is as it was, and nothing is left beside it.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.new" if alone else f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):  # what stopped the writing is what the user must hear of
            new.unlink()
        # PyTorch tells of a full disk with a RuntimeError.
        if isinstance(error, OSError | RuntimeError):
            raise save_error(path, error) from error
        raise


def write_whole(path: Path, data: bytes, alone: bool = True) -> None:
    """`replacing`, for what is there in one piece."""
    with replacing(path, alone) as file:
        file.write(data)


def append(path: Path, line: bytes) -> None:
    """Adds one line, on the disk when this returns: a kill leaves at most a torn one, for `whole_lines` to drop."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        data = memoryview(line + b"\n")
        while data:  # one write takes it all, but on a full disk or for gigabytes
            data = data[os.write(file, data) :]
        os.fsync(file)
    finally:
        os.close(file)


def whole_lines(path: Path, cut: bool = False) -> list[bytes]:
    """The lines of a file without their ends, and without a last one that was not finished; none where there is no
    file. A line ends with a line feed and nothing else: texts may hold whatever else passes for an end.

    Args:
        cut: take the unfinished line out of the file too, for what is appended next.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if cut and whole < len(data):
        os.truncate(path, whole)
    return data[:whole].split(b"\n")[:-1]


def utf8(raw: bytes) -> str:
    """
    Raises:
        BadLine: it is other bytes than text.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"is not UTF-8 text ({error.reason} at byte {error.start})") from error


def json_of(raw: bytes) -> Any:
    """
    Raises:
        BadLine: it is no JSON, or JSON that Python does not read.
    """
    text = utf8(raw)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadLine(f"is not JSON ({error.msg} at character {error.pos})") from error
    except RecursionError as error:
        raise BadLine("is nested too deeply to be read") from error
    except ValueError as error:  # a number with thousands of digits
        raise BadLine(f"cannot be read ({error})") from error


def real_text(value: str) -> str:
    """The same, if it is text: JSON can spell half a character, and a table can hold other bytes.

    Raises:
        BadLine: it is not.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = "half a surrogate pair, or other bytes"
        raise BadLine(f"has something that is no text at character {error.start} ({what})") from error
    return value


def cache_folder() -> Path:
    """Where everything lies that can be made again: `$HYBRID_CACHE`, or `hybrid` in the user's cache folder
    (`$XDG_CACHE_HOME`, or `~/.cache`).

    Raises:
        RuntimeError: there is no home.
    """
    if ours := os.environ.get("HYBRID_CACHE"):
        return Path(ours)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid"


def sync(path: Path) -> None:
    """Onto the disk: a file's bytes, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
