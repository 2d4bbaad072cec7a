"""AUP against figures worked out by hand, and mutants of its definition."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest

from hybrid.evals.document import Act, Quality, Row
from hybrid.evals.laboratory.aup import aup, aup_of

Points = Sequence[tuple[float, float]]

# d3LLM's own table for GSM8K-CoT: Fast-dLLM-LLaDA, with y_max = 74.98 over all methods there.
FAST = [(1.0, 74.79), (2.77, 74.68)]
BEST = 74.98


def weight(y: float, best: float) -> float:
    return min(math.exp(-3 * (1 - y / best)), 1.0)


def by_hand() -> list[tuple[Points, float | None, float]]:
    """Points, y_max, and the figure, each term written out."""
    three: Points = [(1.0, 80.0), (2.0, 78.0), (4.0, 70.0)]  # the last is more than 5 below the first
    # exp(-3 · 0.025) = 0.927743..., so 80 + ½ · 1 · (78 · 0.927743 + 80) = 156.18199
    up: Points = [(1.0, 50.0), (3.0, 60.0)]
    # exp(-3 / 6) = 0.606531, so 50 + ½ · 2 · (60 + 50 · 0.606531) = 140.32653
    return [
        (three, None, 80 + 0.5 * (78 * 0.9277434863 + 80)),
        (up, None, 50 + 60 + 50 * 0.6065306597),
        ([(3.0, 60.0), (1.0, 50.0)], None, 50 + 60 + 50 * 0.6065306597),
        ([(10.5, 98.0)], None, 1029.0),
        ([(1.0, 0.0), (2.0, 0.0)], None, 0.0),
        (FAST, BEST, 74.79 + 0.5 * 1.77 * (74.68 * 0.9880685 + 74.79 * 0.9924267)),
    ]


def wrong(aup: Callable[[Points, float | None], float]) -> int:
    return sum(not math.isclose(aup(points, best), want, rel_tol=1e-6) for points, best, want in by_hand())


def test_known_figures() -> None:
    assert wrong(aup) == 0


def mutant(points: Points, best: float | None, *, alpha: float = 3.0, tolerance: float = 5.0, first: bool = True,
           halves: float = 0.5, capped: bool = True) -> float:  # fmt: skip
    kept = [(r, y) for r, y in sorted(points) if y >= sorted(points)[0][1] - tolerance]
    most = best if best is not None else max(y for _, y in kept)

    def w(y: float) -> float:
        value = math.exp(-alpha * (1 - y / most)) if most else 0.0
        return min(value, 1.0) if capped else value

    total = kept[0][0] * kept[0][1] if first else 0.0
    return total + sum(
        halves * (r - s) * (y * w(y) + z * w(z)) for (s, z), (r, y) in itertools.pairwise(kept)
    )


def test_a_mutant_is_told_apart() -> None:
    assert wrong(mutant) == 0
    changes: list[dict[str, float | bool]] = [
        {"alpha": 2.0}, {"tolerance": 50.0}, {"tolerance": 1.0}, {"first": False}, {"halves": 1.0},
    ]  # fmt: skip
    for change in changes:
        assert wrong(lambda points, best, change=change: mutant(points, best, **change)) > 0, change
    # A y_max below an accuracy there would weigh it above 1 without the cap.
    assert aup([(1.0, 60.0), (2.0, 60.0)], 50.0) == 120.0
    assert mutant([(1.0, 60.0), (2.0, 60.0)], 50.0, capped=False) > 120.0


@pytest.mark.parametrize("points", [[], [(0.0, 50.0)], [(1.0, 101.0)], [(1.0, -1.0)], [(-1.0, 5.0)]])
def test_what_has_no_area(points: Points) -> None:
    with pytest.raises(ValueError, match="points"):
        aup(points)


def test_equal_speeds_count_once_with_the_better_accuracy() -> None:
    assert aup([(1.0, 70.0), (1.0, 80.0), (2.0, 80.0)]) == aup([(1.0, 80.0), (2.0, 80.0)]) == 160.0


def test_the_figure_of_an_act_is_that_of_its_efficient_rows() -> None:
    def row(quality: float | None, speed: float | None) -> Row:
        return Row(mode="ar", setting="s", quality=quality, tokens_per_forward=speed)

    def area(quality: Quality, rows: list[Row], best: float | None = None) -> float | None:
        return aup_of(Act(name="toy", title="A toy", quality=quality, rows=rows), best)

    share = Quality(name="q", unit="share", higher_is_better=True)
    rows = [row(0.8, 1.0), row(0.7, 1.5), row(0.78, 2.0), row(0.79, None)]  # the second is outdone
    want = 80 + 0.5 * (78 * 0.9277434863 + 80)
    assert area(share, rows) == pytest.approx(want)
    assert area(share, rows, best=90.0) != pytest.approx(want)
    assert area(share, [row(0.8, None)]) is None
    assert area(share.model_copy(update={"unit": "nats"}), rows) is None
    assert area(share.model_copy(update={"higher_is_better": False}), rows) is None
