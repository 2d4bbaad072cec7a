"""What passes over the prompts come to: figures of the outputs and the ledger, and timings."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hybrid.evals.document import Call, Histograms, Spread, Timing
from hybrid.evals.measures import agreement, distinct, entropy, ratio, repetition
from hybrid.evals.passes.outputs import Prompt, Setting
from hybrid.evals.passes.runs import Calls, Pass
from hybrid.sampling import GenerationStats, RowStats


def figures_of(
    setting: Setting, found: Pass, prompts: Sequence[Prompt], texts: Sequence[str], reference: list[list[int]] | None
) -> dict[str, Any]:
    """Fields of a row that follow from the outputs and the ledger alone, the same on every machine; `per_prompt` has
    but the speed of each."""
    batched: dict[str, Any] = found.forwards
    ledger = GenerationStats(setting.mode, [RowStats(**row) for row in found.rows], **batched)
    gained = [row.tokens - row.free for row in ledger.rows]
    forwards = [row.settle + row.draft for row in ledger.rows]
    same = None
    if reference is not None:
        same = statistics.mean(agreement(*pair) for pair in zip(found.tokens, reference, strict=True))
    rounds = Counter(n for row in ledger.rows for n in row.accepted)
    return {
        "exact": statistics.mean(text == p.target for p, text in zip(prompts, texts, strict=True)),
        "distinct_2": _mean(map(distinct, found.tokens)),
        "repetition_4": _mean(map(repetition, found.tokens)),
        "entropy": _mean(map(entropy, found.tokens)),
        "agreement": same,
        "tokens_per_forward": ledger.tokens_per_forward,
        "tokens_per_forward_standard_error": ratio(gained, forwards)[1] if sum(forwards) else None,
        "tokens_per_draft": ledger.tokens_per_draft,
        "acceptance": ledger.acceptance,
        "forwards": found.forwards,
        "lossless": setting.lossless,
        "prompts": len(prompts),
        "tokens_out": ledger.tokens,
        "histograms": Histograms(
            tokens_per_step=dict(sorted(found.steps.items(), key=lambda pair: int(pair[0]))),
            acceptance={str(n): rounds[n] for n in sorted(rounds)},
        ),
        "per_prompt": {"new_tokens": gained, "forwards": forwards},
    }


def timings_of(
    first: Pass, timed: Sequence[Pass], calls: Mapping[int, Sequence[Calls]], base: tuple[list[float], list[float]]
) -> dict[str, Any]:
    """Fields of a row that belong to this machine and this hour.

    Args:
        first: the pass before the `timed` ones, whose tokens are graded.
        calls: by batch size, those of each turn.
        base: of greedy ar, the speeds of timed passes and of turns of calls of one prompt; empty where there are none.
    """
    speeds = speeds_of(first, timed)
    firsts = [statistics.median(turn.first) for turn in timed if turn.first]
    peaks = [turn.memory for turn in timed if turn.memory is not None]
    return {
        "tokens_per_second": statistics.median(speeds),
        "time_to_first_token": statistics.median(firsts) if firsts else None,
        "speedup": _times([turn.speed for turn in calls.get(1, [])], base[1]),
        "throughput": _times(speeds, base[0]),
        "timing": Timing(
            repeats=len(timed), tokens_per_second=_spread(speeds), time_to_first_token=_spread(firsts),
            peak_memory_bytes=max(peaks, default=None),
            same_outputs=statistics.mean(float(turn.digest == first.digest) for turn in timed),
            latency=[_latency(size, turns, first.tokens) for size, turns in calls.items()],
        ),
    }  # fmt: skip


def speeds_of(first: Pass, timed: Sequence[Pass]) -> list[float]:
    """Tokens a second of each timed pass, of which the first has the tokens."""
    count = sum(map(len, first.tokens))
    return [count / turn.seconds for turn in timed]


def _latency(size: int, turns: Sequence[Calls], tokens: list[list[int]]) -> Call:
    pairs = [pair for turn in turns for pair in zip(turn.tokens, tokens, strict=False)]
    return Call(
        batch_size=size, seconds=_spread([seconds for turn in turns for seconds in turn.seconds]),
        tokens_per_second=_spread([turn.speed for turn in turns]),
        time_to_first_token=_spread([first for turn in turns for first in turn.first if first is not None]),
        same_tokens=statistics.mean(agreement(*pair) for pair in pairs),
    )  # fmt: skip


def _times(speeds: Sequence[float], base: Sequence[float]) -> float | None:
    """How many times as fast as the same turn of `base`: the median of the turns."""
    if not speeds or not base:
        return None
    return statistics.median(ours / theirs for ours, theirs in zip(speeds, base, strict=True))


def _spread(values: Sequence[float]) -> Spread | None:
    """The median, the least and the most."""
    if not values:
        return None
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None
