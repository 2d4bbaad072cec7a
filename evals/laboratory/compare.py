"""Two results on the same prompts: which differences are beyond noise, by the paired bootstrap.

A resample draws prompts with replacement and takes both results' figures on the drawn ones, so what makes a prompt
hard for both cancels (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13: percentile intervals).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.evals.document import Act, PerPrompt, Results, Row
from hybrid.evals.laboratory.aup import aup_of

Floats = NDArray[np.float64]
LEAST_PROMPTS = 10  # a resample of fewer is hardly one


@dataclass(frozen=True, kw_only=True)
class Difference:
    """B's figure less A's, with the bounds of its confidence interval. `beyond`: the interval does not hold 0."""

    a: float
    b: float
    difference: float
    low: float
    high: float

    @property
    def beyond(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row of both results. `speed` is in tokens per forward; None where a row has none."""

    act: str
    mode: str
    setting: str
    quality: Difference
    speed: Difference | None
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """What of it is beyond noise, in words."""
        said = []
        if self.quality.beyond:
            better = (self.quality.difference > 0) == self.higher_is_better
            said.append("better" if better else "worse")
        if self.speed is not None and self.speed.beyond:
            said.append("faster" if self.speed.difference > 0 else "slower")
        return " and ".join(said) or "within noise"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self) | {"verdict": self.verdict}
        for name, part in (("quality", self.quality), ("speed", self.speed)):
            if part is not None:
                found[name]["beyond_noise"] = part.beyond
        return found


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows that both results have, in A's order; `only`: the rows of one alone, in words; `aup`: of each act that
    has it, (A's, B's), with the same y_max."""

    pairs: list[Pair]
    only: list[str]
    aup: dict[str, tuple[float, float]]


def compare(a: Results, b: Results, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare two results documents row by row; rows with the same mode and setting are pairs.

    Args:
        a, b: of the same prompts.
        confidence: of the intervals, each taken alone: of many, 1 - confidence will be beyond noise by luck.
        resamples: of the prompts; the same for all rows of an act, and drawn by `seed`.

    Raises:
        ValueError: the documents have other prompts or measures, or no act or row in common.
    """
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie in 0.5…1, 0.95 say.")
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}; bounds of an interval take at least 100.")
    theirs = {act.name: act for act in b.acts}
    shared = [(act, theirs[act.name]) for act in a.acts if act.name in theirs]
    if not shared:
        names = [", ".join(act.name for act in document.acts) for document in (a, b)]
        raise ValueError(f"the results have no act in common: {names[0]} against {names[1]}.")
    pairs, only, areas = [], [], {}
    for one, other in shared:
        count = _same_task(one, other)
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)
        rows = {(row.mode, row.setting): row for row in other.rows}
        for row in one.rows:
            twin = rows.pop((row.mode, row.setting), None)
            if twin is None:
                only.append(f"only A: {row.mode}, {row.setting}")
                continue
            pairs.append(_pair(one, row, twin, draws, confidence))
        only += [f"only B: {mode}, {setting}" for mode, setting in rows]
        graded = [row.quality for act in (one, other) for row in act.rows if row.quality is not None]
        best = 100 * max(graded, default=0.0)
        figures = aup_of(one, best), aup_of(other, best)
        if figures[0] is not None and figures[1] is not None:
            areas[one.name] = (figures[0], figures[1])
    if not pairs:
        raise ValueError(f"the results have no row in common: {'; '.join(only)}.")
    return Comparison(pairs=pairs, only=only, aup=areas)


def _same_task(one: Act, other: Act) -> int:
    """How many prompts both have; ValueError unless these and the measure are the same."""
    name, asked = one.name, (one.prompts, other.prompts)
    if asked[0] is None or asked[1] is None:
        raise ValueError(f"{name}: a result does not say which prompts it is of; measure it again.")
    if asked[0].sha256 != asked[1].sha256:
        raise ValueError(
            f"{name}: the results are of other prompts, or of other tokens for them (a tokenizer of its own), so "
            "they cannot be paired. Run both models on the same prompts."
        )
    for key in ("name", "unit", "judge", "aggregate", "higher_is_better"):
        values = [getattr(act.quality, key) for act in (one, other)]
        if values[0] != values[1]:
            raise ValueError(f"{name}: quality.{key} is {values[0]!r} in A and {values[1]!r} in B; measure them alike.")
    lengths = [prompts.max_new_tokens for prompts in asked if prompts]
    if lengths[0] != lengths[1]:
        raise ValueError(f"{name}: max_new_tokens is {lengths[0]} in A and {lengths[1]} in B; measure them alike.")
    if asked[0].count < LEAST_PROMPTS:
        raise ValueError(
            f"{name}: {asked[0].count} prompts are too few to tell noise from a difference; measure on at "
            f"least {LEAST_PROMPTS}, better hundreds."
        )
    return asked[0].count


def _pair(act: Act, a: Row, b: Row, draws: Floats, confidence: float) -> Pair:
    found = []
    for row, which in ((a, "A"), (b, "B")):
        if row.per_prompt is None:
            raise ValueError(f"{act.name}: {row.setting} in {which} has no per_prompt figures; measure it again.")
        if len(row.per_prompt.quality) != draws.shape[1]:
            raise ValueError(
                f"{act.name}: {row.setting} in {which} has {len(row.per_prompt.quality)} per_prompt figures of "
                f"{draws.shape[1]} prompts; measure it again."
            )
        found.append(row.per_prompt)
    qualities = [_quality(per, act.quality.aggregate) for per in found]
    speeds = [_per_forward(per) for per in found if per.new_tokens and any(per.forwards or [])]
    return Pair(
        act=act.name, mode=a.mode, setting=a.setting, quality=_difference(qualities, draws, confidence),
        speed=_difference(speeds, draws, confidence) if len(speeds) == 2 else None,
        higher_is_better=act.quality.higher_is_better,
    )  # fmt: skip


def _quality(per: PerPrompt, aggregate: str) -> tuple[Floats, Floats, bool]:
    values = np.array([0.0 if v is None else v for v in per.quality])
    weights = np.array(per.weight or np.ones(len(values)), dtype=float)
    weights = np.where([v is None for v in per.quality], 0.0, weights)
    return values * weights, weights, aggregate == "perplexity"


def _per_forward(per: PerPrompt) -> tuple[Floats, Floats, bool]:
    return np.array(per.new_tokens, dtype=float), np.array(per.forwards, dtype=float), False


def _difference(
    sides: Sequence[tuple[Floats, Floats, bool]], draws: Floats, confidence: float
) -> Difference:
    """Of two ratios of sums over prompts; `draws` `[R, N]` says how often each resample has each prompt."""
    whole, resampled = [], []
    for above, below, exponential in sides:
        value, values = above.sum() / below.sum(), _over(draws @ above, draws @ below)
        whole.append(float(np.exp(value) if exponential else value))
        resampled.append(np.exp(values) if exponential else values)
    low, high = np.nanquantile(resampled[1] - resampled[0], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(
        a=whole[0], b=whole[1], difference=whole[1] - whole[0], low=_exact(low), high=_exact(high)
    )


def _over(above: Floats, below: Floats) -> Floats:
    """NaN where a resample has nothing to divide by: a few prompts with all the weight."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _exact(bound: float) -> float:
    """A bound that is 0 but for the rounding of sums is 0, or equal results would differ."""
    return 0.0 if abs(bound) < 1e-12 else float(bound)
