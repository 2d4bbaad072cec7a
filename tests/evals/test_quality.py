"""Figures of quality against a table filled in by hand, and by a program that fills it in slowly."""

import math
import warnings
from random import Random

import pytest

from hybrid.evals.measures import (
    agreement,
    distinct,
    edit_similarity,
    entropy,
    exact_match,
    parse_rate,
    parses,
    repetition,
)


def levenshtein(a: str, b: str) -> int:
    """The whole table: fewest insertions, deletions and replacements from each beginning of a to each of b."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if i == 0 or j == 0:
                table[i][j] = i + j
            else:
                other = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
                table[i][j] = min(other, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


@pytest.mark.parametrize(("a", "b", "steps"), [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2)])
def test_the_slow_distance_is_the_well_known_one(a: str, b: str, steps: int) -> None:
    assert levenshtein(a, b) == steps


@pytest.mark.parametrize("alphabet", ["ab", "abcdef \n", "é日\U0001f600 "])
def test_edit_similarity_is_the_share_of_characters_that_stay(alphabet: str) -> None:
    random = Random(0)
    for _ in range(100):
        a, b = ("".join(random.choices(alphabet, k=random.randrange(15))) for _ in range(2))
        longest = max(len(a), len(b))
        expected = 1 - levenshtein(a, b) / longest if longest else 1.0
        assert edit_similarity(a, b) == pytest.approx(expected)
        assert edit_similarity(b, a) == pytest.approx(expected)
        assert 0 <= edit_similarity(a, b) <= 1


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("kitten", "sitting", 4 / 7), ("", "", 1.0), ("", "abc", 0.0), ("same", "same", 1.0), ("abcd", "wxyz", 0.0)],
)
def test_edit_similarity_by_hand(a: str, b: str, expected: float) -> None:
    assert edit_similarity(a, b) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([1, 2, 3, 4], 2, 1.0),
        ([1, 2, 1, 2, 1], 2, 2 / 4),  # (1 2), (2 1), twice each
        ([7, 7, 7, 7, 7], 2, 1 / 4),
        ([1, 1, 2, 2], 1, 2 / 4),
        ([1, 2, 3, 1, 2, 3], 3, 3 / 4),
        ([1, 2], 2, 1.0),
        ([1], 2, None),
        ([], 1, None),
        ([1, 2, 3], 4, None),
    ],
)
def test_distinct_by_hand(tokens: list[int], n: int, expected: float | None) -> None:
    assert distinct(tokens, n) == expected


def test_distinct_counts_pairs_by_default() -> None:
    assert distinct([1, 2, 1, 2, 1]) == 0.5


@pytest.mark.parametrize(
    ("tokens", "reference", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 9, 3], [1, 2, 3], 2 / 3),
        ([1, 2], [1, 2, 3, 4], 2 / 4),  # what is missing differs
        ([1, 2, 3, 4], [1, 2], 2 / 4),
        ([2, 3], [1, 2, 3], 0.0),  # place by place, not shifted
        ([], [], 1.0),
        ([], [1], 0.0),
    ],
)
def test_agreement_by_hand(tokens: list[int], reference: list[int], expected: float) -> None:
    assert agreement(tokens, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([1, 2, 3, 4, 5], 4, 0.0),
        ([1, 2, 1, 2, 1], 2, 2 / 4),  # the second (1 2) and the second (2 1)
        ([7, 7, 7, 7, 7, 7], 4, 2 / 3),
        ([1, 2, 3], 4, None),
    ],
)
def test_repetition_by_hand(tokens: list[int], n: int, expected: float | None) -> None:
    assert repetition(tokens, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 5, 5], 0.0),
        ([1, 2], math.log(2)),
        ([1, 2, 3, 4, 1, 2, 3, 4], math.log(4)),
        ([1, 1, 1, 2], 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ([], None),
    ],
)
def test_entropy_by_hand(tokens: list[int], expected: float | None) -> None:
    assert entropy(tokens) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [("a b", "a b", 1.0), (" a b\n", "a b", 1.0), ("a  b", "a b", 0.0), ("A", "a", 0.0), ("", "\n", 1.0)],
)
def test_exact_match_by_hand(text: str, target: str, expected: float) -> None:
    assert exact_match(text, target) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(x):\n    return x\n", True),
        ("", True),
        ("def f(x):\n", False),
        ("x = (1,", False),
        ("raise SystemExit(3)", True),  # read, not run
        ("x = 1\0", False),
        ("x = '\ud83d'", False),
        ("(" * 5000 + ")" * 5000, False),
        ("-" * 200_000 + "1", False),
        (r"x = '\d'", True),
    ],
)
def test_what_parses(text: str, expected: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parses(text) is expected


def test_the_parse_rate_is_a_share() -> None:
    assert parse_rate(["x = 1", "x =", "pass", "?"]) == 0.5
    with pytest.raises(ValueError, match="texts: there are none"):
        parse_rate([])
