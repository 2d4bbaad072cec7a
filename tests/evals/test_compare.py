"""The paired bootstrap on results whose truth is known: how often it cries wolf, and what it finds."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hybrid.evals.laboratory.compare import Comparison
from hybrid.evals.laboratory.compare import compare as compared
from hybrid.evals.results import SCHEMA, check_results, measured_act

Document = dict[str, Any]
Array = NDArray[Any]
PROMPTS = 80
SHARE = {"name": "solved", "unit": "share", "higher_is_better": True, "aggregate": "mean"}


def document(
    quality: Array, *, forwards: Array | None = None, weight: Array | None = None, measure: Document = SHARE,
    setting: str = "greedy", **prompts: Any,
) -> Document:  # fmt: skip
    """One act with one row. Each prompt gives 24 new tokens."""
    count = len(quality)
    forwards = np.full(count, 12) if forwards is None else forwards
    weights = np.ones(count) if weight is None else weight
    mean = float((quality * weights).sum() / weights.sum())
    per = {"quality": quality.tolist(), "new_tokens": [24] * count, "forwards": forwards.tolist()}
    if weight is not None:
        per["weight"] = weight.tolist()
    row = {
        "mode": "block", "setting": setting, "per_prompt": per,
        "quality": float(np.exp(mean)) if measure["aggregate"] == "perplexity" else mean,
        "tokens_per_forward": 24 * count / max(1, int(forwards.sum())),
    }  # fmt: skip
    about = {"count": count, "sha256": "same", "max_new_tokens": 24} | prompts
    act = {"name": "toy", "title": "A toy", "quality": measure, "prompts": about, "rows": [row]}
    return {"schema": SCHEMA, "created": "now", "hybrid": "0", "environment": {}, "acts": [act]}


def compare(a: Document, b: Document, **options: Any) -> Comparison:
    return compared(check_results(a, "A"), check_results(b, "B"), **options)


def test_without_a_difference_about_one_in_twenty_is_beyond_noise() -> None:
    """Two runs of equally good models, whose outcomes share what makes a prompt hard; and of equally fast ones."""
    source = np.random.default_rng(0)
    wolf = {"quality": 0, "speed": 0}
    times = 400
    for _ in range(times):
        hard = source.uniform(0.2, 0.9, PROMPTS)
        a, b = (source.uniform(size=PROMPTS) < hard for _ in range(2))
        slow = source.integers(6, 24, PROMPTS)
        forwards = [slow + source.integers(-3, 4, PROMPTS) for _ in range(2)]
        found = compare(
            document(a.astype(float), forwards=forwards[0]), document(b.astype(float), forwards=forwards[1]),
            resamples=600, seed=1,
        )  # fmt: skip
        (pair,) = found.pairs
        assert pair.speed is not None
        wolf["quality"] += pair.quality.beyond
        wolf["speed"] += pair.speed.beyond
    # 20 expected of 400; the binomial's 99.9% range is 8 to 36, and percentile intervals run a little narrow.
    assert all(6 <= count <= 40 for count in wolf.values()), wolf


def test_pairing_finds_what_unpaired_noise_would_hide() -> None:
    """Eight more of eighty prompts are right, and none less: paired, that is no noise."""
    source = np.random.default_rng(2)
    found = 0
    for _ in range(50):
        a = (source.uniform(size=PROMPTS) < 0.5).astype(float)
        b = a.copy()
        b[np.flatnonzero(a == 0)[:8]] = 1.0
        (pair,) = compare(document(a), document(b), resamples=600).pairs
        assert pair.quality.difference == pytest.approx(0.1)
        found += pair.verdict == "better"
        # The same outcomes in another order have nothing in common but their mean.
        (mixed,) = compare(document(a), document(source.permutation(b)), resamples=600).pairs
        assert mixed.quality.high - mixed.quality.low > 1.5 * (pair.quality.high - pair.quality.low)
    assert found == 50


def test_intervals_are_those_of_the_textbook() -> None:
    """For means the bootstrap's interval is nearly the normal one: ±1.96 standard errors of the paired differences."""
    source = np.random.default_rng(3)
    a, d = source.normal(size=400), source.normal(0.3, 1.0, size=400)
    (pair,) = compare(document(a), document(a + d), resamples=8000).pairs
    half = 1.96 * d.std(ddof=1) / 20
    assert (pair.quality.low, pair.quality.high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.1 * half)


def test_equal_results_are_within_noise() -> None:
    quality = np.random.default_rng(4).uniform(size=PROMPTS)
    (pair,) = compare(document(quality), document(quality)).pairs
    assert pair.verdict == "within noise"
    assert (pair.quality.low, pair.quality.high) == (0.0, 0.0)


def test_speeds_and_directions() -> None:
    quality, fewer = np.linspace(0, 1, PROMPTS), np.full(PROMPTS, 8)
    (pair,) = compare(document(quality), document(quality, forwards=fewer)).pairs
    assert pair.speed is not None
    assert (pair.speed.a, pair.speed.b, pair.verdict) == (2.0, 3.0, "faster")
    (pair,) = compare(document(quality), document(quality - 0.2, forwards=fewer)).pairs
    assert pair.verdict == "worse and faster"
    (pair,) = compare(document(quality), document(quality, forwards=np.zeros(PROMPTS, dtype=int))).pairs
    assert pair.speed is None
    lower = {**SHARE, "unit": "nats", "higher_is_better": False}
    (pair,) = compare(document(quality, measure=lower), document(quality - 0.2, measure=lower)).pairs
    assert pair.verdict == "better"


def test_perplexities_weigh_by_tokens() -> None:
    measure = {"name": "judge perplexity", "unit": "per token", "higher_is_better": False, "aggregate": "perplexity"}
    source = np.random.default_rng(5)
    nats, weight = source.uniform(1, 3, PROMPTS), source.integers(1, 40, PROMPTS)
    (pair,) = compare(
        document(nats, weight=weight, measure=measure), document(nats + 0.1, weight=weight, measure=measure)
    ).pairs
    want = np.exp((nats * weight).sum() / weight.sum())
    assert (pair.quality.a, pair.quality.b) == pytest.approx((want, want * np.exp(0.1)))
    assert pair.verdict == "worse"
    # What was not graded has no weight.
    holes = document(nats, weight=weight, measure=measure)
    per = holes["acts"][0]["rows"][0]["per_prompt"]
    per["quality"][0], per["weight"][0] = None, 0.0
    (pair,) = compare(holes, holes).pairs
    assert pair.quality.a == pytest.approx(np.exp((nats * weight)[1:].sum() / weight[1:].sum()))


def test_rows_of_one_result_alone_are_named_and_the_seed_decides() -> None:
    source = np.random.default_rng(6)
    a, b = (document(source.uniform(size=PROMPTS)) for _ in range(2))
    b["acts"][0]["rows"].append({**b["acts"][0]["rows"][0], "setting": "new"})
    assert compare(a, b).only == ["only B: block, new"]
    assert compare(b, a).only == ["only A: block, new"]
    assert compare(a, b) == compare(a, b)
    assert compare(a, b).pairs != compare(a, b, seed=1).pairs
    assert compare(a, b).aup.keys() == {"toy"}


QUALITY = np.linspace(0, 1, PROMPTS)


def changed(document: Document, **fields: Any) -> Document:
    return document | {"acts": [document["acts"][0] | fields]}


@pytest.mark.parametrize(("other", "message"), [
    (document(QUALITY, sha256="another"), "toy: the results are of other prompts"),
    (document(QUALITY, max_new_tokens=8), "max_new_tokens is 24 in A and 8 in B"),
    (document(QUALITY, measure={**SHARE, "name": "exact"}), "quality.name is 'solved' in A and 'exact' in B"),
    (document(QUALITY, measure={**SHARE, "judge": "x"}), "quality.judge is None in A and 'x' in B"),
    (document(QUALITY, setting="else"), "no row in common: only A: block, greedy; only B: block, else"),
    (changed(document(QUALITY), name="chess"), "no act in common: toy against chess"),
    (changed(document(QUALITY), prompts=None), "does not say which prompts"),
    (changed(document(QUALITY), quality={**SHARE, "higher_is_better": False}), "higher_is_better is True in A and Fal"),
])  # fmt: skip
def test_what_does_not_compare(other: Document, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(document(QUALITY), other)


def test_more_bad_input() -> None:
    few = document(np.linspace(0, 1, 5))
    with pytest.raises(ValueError, match="5 prompts are too few"):
        compare(few, few)
    whole = document(QUALITY)
    for options, message in (({"confidence": 1.0}, "confidence is 1.0"), ({"resamples": 3}, "resamples is 3")):
        with pytest.raises(ValueError, match=message):
            compare(whole, whole, **options)
    bare = document(QUALITY)
    del bare["acts"][0]["rows"][0]["per_prompt"]
    with pytest.raises(ValueError, match="greedy in A has no per_prompt"):
        compare(bare, whole)
    with pytest.raises(ValueError, match="greedy in A has 80 per_prompt figures of 70 prompts"):
        compare(document(QUALITY, count=70), document(QUALITY, count=70))


def test_results_of_benchmarks_compare_question_by_question() -> None:
    """Without a speed; and those of other questions do not."""
    right = [np.random.default_rng(seed).uniform(size=40) < 0.5 for seed in (0, 1)]

    def act(values: Array, questions: list[str]) -> Document:
        row = {"value": float(values.mean()), "standard_error": 0.1, "values": values.astype(float).tolist()}
        made = measured_act(
            "gsm8k", {("ar", "greedy"): row}, metric="exact match", unit="share", higher_is_better=True,
            questions=questions,
        )  # fmt: skip
        return changed(document(QUALITY), **made.plain())

    asked = [f"question {i}" for i in range(40)]
    (pair,) = compare(act(right[0], asked), act(right[1], asked), resamples=400).pairs
    assert pair.speed is None and pair.quality.difference == pytest.approx(right[1].mean() - right[0].mean())
    (best,) = compare(act(right[0], asked), act(right[0] | True, asked), resamples=400).pairs
    assert best.verdict == "better"
    with pytest.raises(ValueError, match="other prompts"):
        compare(act(right[0], asked), act(right[1], asked[::-1]))
