"""`hybrid eval likelihood`: how likely given text is by each decoding law."""

from pathlib import Path


def likelihood(
    text: list[Path],
    model: str = "runs/quickstart/text",
    block_sizes: tuple[int, ...] = (1, 4, 8),
    samples: int = 4,
    length: int = 128,
    rows: int | None = None,
) -> None:
    """Score text files: exact left-to-right likelihood, and the bounds of the other decoding laws.

    Each decoding law has its own likelihood. Left to right it is exact; for blocks and for diffusion over everything
    it is a bound that lies above it, estimated by drawing masks, with a standard error.

    Args:
        text: files to score.
        model: folder of a trained model, or a hub name.
        block_sizes: windows for the block bound; 1 is exactly left to right.
        samples: mask draws a row; the error falls with their square root.
        length: tokens a row: a token is scored with at most this much text before it.
        rows: score only this many rows, evenly spread (default: all).
    """
    from transformers import AutoTokenizer

    from hybrid.commands.console import wide_console
    from hybrid.commands.generate import load
    from hybrid.evals.likelihood import score, tokenized
    from hybrid.evals.table import likelihood_table

    loaded, tokenizer = load(model), AutoTokenizer.from_pretrained(model)
    documents = [read_text(path) for path in text]
    if not any(documents):
        raise ValueError(f"text: {', '.join(map(str, text))}: nothing to score, the files are empty.")
    begin = next((i for i in (loaded.config.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    if begin is None:
        raise ValueError(f"model: {model} has neither a bos nor an eos token to begin a text with.")
    scored = tokenized(tokenizer, documents, length=length, begin=begin, rows=rows)
    found = score(loaded, scored, block_sizes=tuple(block_sizes), samples=samples)
    wide_console().print(likelihood_table({"title": model, "likelihood": [entry.record() for entry in found]}))


def read_text(path: Path) -> str:
    """A UTF-8 file, or a ValueError that says where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
