"""`hybrid eval likelihood` and its baseline that counts, `hybrid eval ngram`: how likely given text is."""

from pathlib import Path

import numpy as np

from hybrid.commands.console import leave, wide_console
from hybrid.commands.models import load, load_tokenizer
from hybrid.commands.options import On, check_file
from hybrid.evals.acts import likelihood_act
from hybrid.evals.laboratory.ngram import NGram
from hybrid.evals.likelihood import score, tokenized
from hybrid.evals.results import document_of
from hybrid.evals.table import likelihood_table
from hybrid.texts import encode_behind, prefix_of
from hybrid.training.tasks.stdlib import load_stdlib

STDLIB = "stdlib"


def likelihood(
    text: list[str],
    model: str = "hybrid-stdlib",
    block_sizes: tuple[int, ...] = (1, 4, 8),
    samples: int = 4,
    orders: int = 0,
    length: int = 128,
    rows: int | None = None,
    out: Path | None = None,
    on: On = On(),
) -> None:
    """Score text files: exact left-to-right likelihood, and the bounds of the other decoding laws.

    Each decoding law has its own likelihood. Left to right it is exact; for blocks and for diffusion over everything
    it is a bound that lies above it, estimated by drawing masks, with a standard error.

    Example: `hybrid eval likelihood stdlib:test --rows 50`.

    Args:
        text: files to score, or stdlib:validation or stdlib:test, the parts that the shipped model never saw.
        model: folder of a trained model, hub name or shipped model.
        block_sizes: windows for the block bound; 1 is exactly left to right.
        samples: mask draws a row; the error falls with their square root.
        orders: also show each bound tightened: the mean over this many orders of reveal, before the logarithm. Costs
            as many forwards as orders times masked slots of a window, for each of the samples.
        length: tokens a row: a token is scored with at most this much text before it.
        rows: score only this many rows, evenly spread (default: all).
        out: file for the result, as JSON, which `hybrid eval compare` reads.
    """
    check_file("out", out)
    loaded, tokenizer = load(model, on), load_tokenizer(model)
    documents = texts(text, "text")
    scored = tokenized(tokenizer, documents, length=length, begin=prefix_of(tokenizer), rows=rows)
    found = score(loaded, scored, block_sizes=tuple(block_sizes), samples=samples, orders=orders)
    act = likelihood_act(found, scored, title=f"{model}: likelihood", source=", ".join(text))
    wide_console().print(likelihood_table(model, act.likelihood or []))
    leave(out, document_of(loaded, [act], model=model).plain())


def ngram(
    text: list[str],
    train: str = "stdlib:train",
    model: str = "hybrid-stdlib",
    order: int = 5,
    length: int = 256,
    rows: int | None = None,
) -> None:
    """Score texts with an n-gram model: what a neural model of the same tokens has to beat.

    Modified Kneser-Ney smoothing, counted on the training text. Bits per byte stand beside those of
    `hybrid eval likelihood` with the same texts, length and rows.

    Example: `hybrid eval ngram stdlib:test --rows 50`.

    Args:
        text: files to score, or stdlib:validation or stdlib:test.
        train: a file to count, or stdlib:train, what the shipped model was trained on.
        model: folder, hub name or shipped model whose tokenizer makes the tokens.
        order: the n of the n-grams.
        length: tokens a row, as the neural model sees them.
        rows: score only this many rows, evenly spread (default: all).
    """
    tokenizer = load_tokenizer(model)
    begin = prefix_of(tokenizer)
    counted: list[int] = []
    for document in texts([train], "train"):
        counted += [begin, *encode_behind(tokenizer, document, train)]
    scored = tokenized(tokenizer, texts(text, "text"), length=length, begin=begin, rows=rows)
    found = NGram(np.array(counted), order=order, vocab_size=len(tokenizer)).score(scored)
    wide_console().print(likelihood_table(f"{order}-gram of {train}", [found.record()]))


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
    if word != STDLIB or Path(source).exists():
        return [text_of(Path(source), field)]
    if part not in ("train", "validation", "test"):
        raise ValueError(f"{field}: {source}: name a part, as stdlib:train, stdlib:validation or stdlib:test.")
    return [document.text for document in getattr(load_stdlib(), part)]


def text_of(file: Path, field: str) -> str:
    """
    Raises:
        ValueError: it is not UTF-8; `field` is named.
        OSError: there is no such file.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}: {file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
