"""`hybrid eval likelihood`: how likely given text is by each decoding law."""


def likelihood(
    text: list[str],
    model: str = "hybrid-stdlib",
    block_sizes: tuple[int, ...] = (1, 4, 8),
    samples: int = 4,
    orders: int = 0,
    length: int = 128,
    rows: int | None = None,
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
    """
    from hybrid.commands.console import wide_console
    from hybrid.commands.eval.texts import texts
    from hybrid.commands.generate import load, load_tokenizer
    from hybrid.evals.likelihood import score, tokenized
    from hybrid.evals.table import likelihood_table
    from hybrid.texts import prefix_of

    loaded, tokenizer = load(model), load_tokenizer(model)
    documents = texts(text, "text")
    scored = tokenized(tokenizer, documents, length=length, begin=prefix_of(tokenizer), rows=rows)
    found = score(loaded, scored, block_sizes=tuple(block_sizes), samples=samples, orders=orders)
    wide_console().print(likelihood_table(model, [entry.record() for entry in found]))
