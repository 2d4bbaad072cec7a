"""Texts that a command scores or counts: files, or a part of the standard library by its name."""

from pathlib import Path

STDLIB = "stdlib"


def texts(sources: list[str], field: str) -> list[str]:
    """The texts of files and of `stdlib:train`, `stdlib:validation` or `stdlib:test` (see
    `hybrid.training.tasks.stdlib`).

    Raises:
        ValueError: a file is not UTF-8, there is no such part, or all is empty; `field` is named.
        OSError: there is no such file.
    """
    found = [text for source in sources for text in _of(source, field)]
    if not any(found):
        raise ValueError(f"{field}: {', '.join(sources)}: nothing to score, the files are empty.")
    return found


def _of(source: str, field: str) -> list[str]:
    word, _, part = source.partition(":")
    if word == STDLIB and not Path(source).exists():
        from hybrid.training.tasks.stdlib import load_stdlib

        if part not in ("train", "validation", "test"):
            raise ValueError(f"{field}: {source}: name a part, as stdlib:train, stdlib:validation or stdlib:test.")
        return [document.text for document in getattr(load_stdlib(), part)]
    try:
        return [Path(source).read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: {source} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
