"""Figures of quality against a table filled in by hand, and by a program that fills it in slowly."""

from random import Random

import pytest

from hybrid.evals.quality import agreement, distinct, edit_similarity


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
