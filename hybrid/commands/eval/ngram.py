"""`hybrid eval ngram`: the baseline that counts."""


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
    import numpy as np

    from hybrid.commands.console import wide_console
    from hybrid.commands.eval.texts import texts
    from hybrid.commands.generate import load_tokenizer
    from hybrid.evals.laboratory.ngram import NGram
    from hybrid.evals.likelihood import tokenized
    from hybrid.evals.table import likelihood_table
    from hybrid.texts import encode_behind, prefix_of

    tokenizer = load_tokenizer(model)
    begin = prefix_of(tokenizer)
    counted: list[int] = []
    for document in texts([train], "train"):
        counted += [begin, *encode_behind(tokenizer, document, train)]
    scored = tokenized(tokenizer, texts(text, "text"), length=length, begin=begin, rows=rows)
    found = NGram(np.array(counted), order=order, vocab_size=len(tokenizer)).score(scored)
    wide_console().print(likelihood_table(f"{order}-gram of {train}", [found.record()]))
