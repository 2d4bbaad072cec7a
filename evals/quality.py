"""How good a continuation is: figures on text and tokens, each between 0 and 1 and higher for better, but for
`distinct`, which only says whether a text repeats itself."""

from collections.abc import Sequence

from torchmetrics.functional.text import edit_distance


def edit_similarity(text: str, target: str) -> float:
    """1 - Levenshtein distance / the longer length, over characters."""
    longest = max(len(text), len(target))
    return 1.0 - float(edit_distance(text, target)) / longest if longest else 1.0


def distinct(tokens: Sequence[int], n: int = 2) -> float | None:
    """Different n-grams over all n-grams (arXiv 1510.03055): low for text in loops; None for fewer than n tokens."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Share of places at which two outputs have the same token; a place that one of them lacks differs."""
    longest = max(len(tokens), len(reference))
    return sum(a == b for a, b in zip(tokens, reference, strict=False)) / longest if longest else 1.0
