"""What passes over the prompts come to: figures of the outputs and the ledger, and timings."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from hybrid.evals.columns import Record
from hybrid.evals.measures import ratio
from hybrid.evals.passes.outputs import Prompt, Setting
from hybrid.evals.quality import agreement, distinct, entropy, repetition
from hybrid.sampling import GenerationStats, RowStats


def figures_of(
    setting: Setting, found: Record, prompts: Sequence[Prompt], texts: Sequence[str],
    reference: list[list[int]] | None,
) -> Record:  # fmt: skip
    """What follows from the outputs and the ledger alone: the same on every machine."""
    tokens = found["tokens"]
    ledger = GenerationStats(setting.mode, [RowStats(**row) for row in found["rows"]], **found["forwards"])
    gained = [row.tokens - row.free for row in ledger.rows]
    forwards = [row.settle + row.draft for row in ledger.rows]
    same = None
    if reference is not None:
        same = statistics.mean(agreement(*pair) for pair in zip(tokens, reference, strict=True))
    rounds = Counter(n for row in ledger.rows for n in row.accepted)
    return {
        "mode": setting.mode,
        "setting": setting.name,
        "exact": statistics.mean(text == p.target for p, text in zip(prompts, texts, strict=True)),
        "distinct_2": _mean(map(distinct, tokens)),
        "repetition_4": _mean(map(repetition, tokens)),
        "entropy": _mean(map(entropy, tokens)),
        "agreement": same,
        "tokens_per_forward": ledger.tokens_per_forward,
        "tokens_per_forward_standard_error": ratio(gained, forwards)[1] if sum(forwards) else None,
        "tokens_per_draft": ledger.tokens_per_draft,
        "acceptance": ledger.acceptance,
        "forwards": found["forwards"],
        "lossless": setting.lossless,
        "prompts": len(prompts),
        "tokens_out": ledger.tokens,
        "histograms": {
            "tokens_per_step": dict(sorted(found["steps"].items(), key=lambda pair: int(pair[0]))),
            "acceptance": {str(n): rounds[n] for n in sorted(rounds)},
        },
        "per_prompt": {"new_tokens": gained, "forwards": forwards},
    }


def timings_of(
    first: Record, timed: list[Record], latencies: dict[int, list[Record]], base: tuple[list[Record], list[Record]]
) -> Record:
    """What belongs to this machine and this hour.

    Args:
        timed: the timed passes over all prompts.
        latencies: by batch size, a record for each turn of single calls.
        base: of greedy ar, the timed passes and the turns of calls of one prompt; empty where there are none.
    """
    count = sum(map(len, first["tokens"]))
    speeds = [count / turn["seconds"] for turn in timed]
    firsts = [statistics.median(turn["first"]) for turn in timed if turn["first"]]
    peaks = [turn["memory"] for turn in timed if turn["memory"] is not None]
    return {
        "tokens_per_second": statistics.median(speeds),
        "time_to_first_token": statistics.median(firsts) if firsts else None,
        "speedup": _times(latencies.get(1, []), base[1]),
        "throughput": _times([turn | {"tokens": first["tokens"]} for turn in timed], base[0]),
        "timing": {
            "repeats": len(timed),
            "tokens_per_second": _spread(speeds),
            "time_to_first_token": _spread(firsts),
            "peak_memory_bytes": max(peaks, default=None),
            "same_outputs": statistics.mean(float(turn["digest"] == first["digest"]) for turn in timed),
            "latency": [_latency(size, calls, first["tokens"]) for size, calls in latencies.items()],
        },
    }  # fmt: skip


def _latency(size: int, turns: list[Record], tokens: list[list[int]]) -> Record:
    pairs = [pair for turn in turns for pair in zip(turn["tokens"], tokens, strict=False)]
    firsts = [first for turn in turns for first in turn["first"] if first is not None]
    return {
        "batch_size": size,
        "seconds": _spread([seconds for turn in turns for seconds in turn["seconds"]]),
        "tokens_per_second": _spread([_speed(turn) for turn in turns]),
        "time_to_first_token": _spread(firsts),
        "same_tokens": statistics.mean(agreement(*pair) for pair in pairs),
    }


def _speed(turn: Record) -> float:
    """Tokens a second."""
    seconds = turn["seconds"]
    return sum(map(len, turn["tokens"])) / (sum(seconds) if isinstance(seconds, list) else seconds)


def _times(turns: list[Record], base: list[Record]) -> float | None:
    """How many times as fast as the same turn of `base`: the median of the turns."""
    if not turns or not base:
        return None
    return statistics.median(_speed(ours) / _speed(theirs) for ours, theirs in zip(turns, base, strict=True))


def _spread(values: Sequence[float]) -> Record | None:
    """The median, the least and the most."""
    if not values:
        return None
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None
