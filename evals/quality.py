"""How good a continuation is: figures on text and tokens. Those that compare with a target lie between 0 and 1, higher
for better; `distinct`, `repetition` and `entropy` only say whether a text repeats itself, which a low perplexity
rewards (arXiv 1904.09751)."""

import ast
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torchmetrics.functional.text import edit_distance


def edit_similarity(text: str, target: str) -> float:
    """1 - Levenshtein distance / the longer length, over characters."""
    longest = max(len(text), len(target))
    return 1.0 - float(edit_distance(text, target)) / longest if longest else 1.0


def exact_match(text: str, target: str) -> float:
    """1 where the two are the same, else 0; blanks and lines' ends at either end do not count."""
    return float(text.strip() == target.strip())


def distinct(tokens: Sequence[int], n: int = 2) -> float | None:
    """Different n-grams over all n-grams (arXiv 1510.03055): low for text in loops; None for fewer than n tokens."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def repetition(tokens: Sequence[int], n: int = 4) -> float | None:
    """Share of n-grams that stood before in the same text (seq-rep-n of arXiv 1908.04319); 1 - `distinct`, and None
    for fewer than n tokens."""
    share = distinct(tokens, n)
    return None if share is None else 1.0 - share


def entropy(tokens: Sequence[int]) -> float | None:
    """Of the token distribution of one text, in nats; None for no tokens.

    At most the log of the number of tokens, so compare texts of one length. Beside a judge's perplexity it shows
    decoding that is only cautious (arXiv 2409.02908).
    """
    total = len(tokens)
    return sum(n / total * math.log(total / n) for n in Counter(tokens).values()) if total else None


def parses(text: str) -> bool:
    """Whether `text` is Python by its grammar (`ast.parse`): it is read and never executed.

    An empty text and a comment parse, so this says nothing alone.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape in a string is the text's business, not the caller's
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: null bytes, half a surrogate pair
            return False
    return True


def parse_rate(texts: Sequence[str]) -> float:
    """Share of texts that parse as Python.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("texts: there are none to parse.")
    return sum(map(parses, texts)) / len(texts)


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Share of places at which two outputs have the same token; a place that one of them lacks differs."""
    longest = max(len(tokens), len(reference))
    return sum(a == b for a, b in zip(tokens, reference, strict=False)) / longest if longest else 1.0


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Mean of a measure over texts and its standard error, for a results document; None where there are too few."""
    return {
        "value": statistics.fmean(values) if values else None,
        "standard_error": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
    }
