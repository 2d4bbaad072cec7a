"""AUP, accuracy under parallelism: one figure for a checkpoint's frontier, as d3LLM defines it."""

import itertools
import math
from collections.abc import Sequence

from hybrid.evals.document import Act
from hybrid.evals.table import pareto

ALPHA = 3.0
TOLERANCE = 5.0


def aup(points: Sequence[tuple[float, float]], best: float | None = None) -> float:
    """Accuracy under parallelism of (tokens per forward rho, accuracy y in per cent), in any order.

        rho_1 y_1 + 1/2 sum over i > 1 of (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1)))
        W(y) = min(exp(-3 (1 - y / y_max)), 1)

    with the points in the order of rho, and those left out whose accuracy is more than 5 points below that of the
    slowest, y_1. Source: d3LLM, "AUP: when Accuracy Meets Parallelism in Diffusion Language Models"
    (hao-ai-lab.github.io, 2025), alpha = 3. The paper's rho are all different; of equal ones, the best accuracy counts.

    Args:
        best: y_max, the highest accuracy that any of the compared methods reaches on the task; by default that of
            these points. Figures compare only where it is the same.

    Raises:
        ValueError: no points, a rho that is not above 0, an accuracy outside 0…100.
    """
    if not points:
        raise ValueError("points: there are none; AUP needs at least one (tokens per forward, accuracy).")
    for rho, y in points:
        if not (rho > 0 and 0 <= y <= 100):
            raise ValueError(f"points: ({rho}, {y}) must be tokens per forward above 0 and an accuracy in 0…100.")
    top: dict[float, float] = {}
    for rho, y in points:
        top[rho] = max(y, top.get(rho, 0.0))
    ordered = sorted(top.items())
    first = ordered[0][1]
    kept = [(rho, y) for rho, y in ordered if y >= first - TOLERANCE]
    most = max(y for _, y in kept) if best is None else best

    def weighed(y: float) -> float:
        return y * min(math.exp(-ALPHA * (1 - y / most)), 1.0) if most > 0 else 0.0

    total = kept[0][0] * kept[0][1]
    for (rho_before, y_before), (rho, y) in itertools.pairwise(kept):
        total += 0.5 * (rho - rho_before) * (weighed(y) + weighed(y_before))
    return total


def aup_of(act: Act, best: float | None = None) -> float | None:
    """The AUP of an act's efficient rows, which are its frontier; None where the quality is no share, or no row has
    tokens per forward.

    Args:
        best: y_max in per cent; by default the highest quality of all rows.
    """
    if act.quality.unit != "share" or not act.quality.higher_is_better:
        return None
    shares = {i: 100 * row.quality for i, row in enumerate(act.rows) if row.quality is not None}
    points = [(act.rows[i].tokens_per_forward or 0.0, shares[i]) for i in sorted(pareto(act.rows))]
    if not points or any(not 0 <= y <= 100 for y in shares.values()):
        return None
    return aup(points, max(shares.values()) if best is None else best)
