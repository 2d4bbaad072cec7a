"""The frontier: every mode and setting on the same prompts, each speed beside the quality of the same outputs.

Each setting passes over the prompts 1 + `repeats` times. The first pass warms it up and is watched: it says how many
tokens each forward revealed. The others are timed, all settings in turn, so that a machine whose speed drifts is fair
to all.
"""

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hybrid import HybridForCausalLM, __version__
from hybrid.evals.journal import Journal, fingerprint, key_of
from hybrid.evals.likelihood import written_nll
from hybrid.evals.machine import PeakMemory, environment
from hybrid.evals.measures import Grades, Measure, Score, ratio, scored
from hybrid.evals.outputs import Outputs, Prompt, Reveals, Setting, decode, text_of
from hybrid.evals.quality import agreement, distinct, entropy, repetition
from hybrid.evals.shards import ALONE, Shards
from hybrid.evals.sweep import check_settings, sampled
from hybrid.sampling import GenerationStats, RowStats
from hybrid.sampling.record import Watcher

__all__ = ["Outputs", "Prompt", "Score", "Setting", "decode", "environment", "frontier"]

Record = dict[str, Any]
REFERENCE = "greedy ar, the reference"
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Progress:
    """What is being run, after `done` of `total` batches. As text: what is being run."""

    what: str
    done: int
    total: int

    def __str__(self) -> str:
        return self.what


def frontier(
    model: HybridForCausalLM, tokenizer: Any, prompts: Sequence[Prompt], settings: Sequence[Setting],
    score: Score | Measure, *, max_new_tokens: int, batch_size: int = 32, repeats: int = 3, samples: int = 6,
    latency_batch_sizes: Sequence[int] = (), also: Sequence[Measure] = (), seed: int = 0,
    journal: Journal | None = None, shards: Shards = ALONE, progress: Callable[[Progress], object] = lambda _: None,
    **options: Any,
) -> tuple[list[Record], list[Record]]:  # fmt: skip
    """Rows and samples for the results document (`results.schema.json` says what each field is).

    Greedy left-to-right decoding is the reference of `agreement`; it is run first, whether or not it is among the
    settings.

    Args:
        score: the quality: a function of prompt, output and target (which may then be empty), or a `Measure`.
        repeats: timed passes of each setting, of which the median counts.
        samples: how many prompts to show with all outputs.
        latency_batch_sizes: also time single calls of this many prompts, the first ones.
        also: further measures of the same outputs.
        seed: of all sampling; a prompt's draws depend on it and on the prompt's number.
        journal: keeps every finished pass, and gives those that are in it already.
        shards: the processes that share the prompts; the first has the results, which are those of a single process,
            and the others return empty lists.
        progress: told before each batch what is being run.
        options: of `generate`, for all settings (`eos_token_id=...`).

    Raises:
        ValueError: no prompts, a prompt that does not fit the model or has no target where one is needed, two settings
            of one name, or a setting that the model cannot run.
    """
    measure = score if isinstance(score, Measure) else scored(score, targets=False)
    check_prompts(model, prompts, max_new_tokens, needs_targets=any(m.targets for m in (measure, *also)))
    _check(prompts, settings, batch_size, repeats, latency_batch_sizes)
    check_settings(model, settings, max(len(p.ids) for p in prompts), max_new_tokens, options)
    runs = _Runs(
        model=model, tokenizer=tokenizer, prompts=prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
        seed=seed, journal=journal, shards=shards, options=options,
    )  # fmt: skip
    causal = model.config.clean_attention == "causal"
    plain = {k: v for k, v in options.items() if k not in SAMPLING}
    greedy = Setting(name=REFERENCE, mode="ar", options={"do_sample": False})
    plan: list[tuple[Setting, int, int | None]] = [(greedy, 0, None)] if causal else []
    for turn in range(1 + repeats):
        for setting in settings:
            plan.append((setting, turn, None))
            plan += [(setting, turn, size) for size in latency_batch_sizes if turn]

    passes: dict[str, list[Record]] = {}
    latencies: dict[tuple[str, int], list[Record]] = {}
    meter = _Meter(progress, sum(1 if size else runs.batches for _, _, size in plan))
    for setting, turn, size in plan:
        meter.begin(f"{setting.mode}: {setting.name}" + (f", batch size {size}" if size else ""))
        if size is None:
            given, watched = (plain, False) if setting is greedy else (options, turn == 0)
            found = runs.one_pass(setting, turn, given, watched=watched, told=meter.batch)
            passes.setdefault(setting.name, []).append(found)
        else:
            latencies.setdefault((setting.name, size), []).append(runs.one_call(setting, turn, size))
        meter.end(1 if size else runs.batches)
    meter.begin("grading the outputs")
    if shards.rank:
        return [], []

    reference = passes.pop(REFERENCE)[0]["tokens"] if causal else None
    rows, texts = [], {}
    for setting in settings:
        first, *timed = passes[setting.name]
        texts[setting.name] = [text_of(tokenizer, tokens) for tokens in first["tokens"]]
        figures = _figures(setting, first, prompts, texts[setting.name], reference)
        figures["ar_nats_per_token"] = None
        if causal and figures["tokens_out"]:
            written = written_nll(model, [p.ids for p in prompts], first["tokens"])
            figures["ar_nats_per_token"] = float(written.sum()) / figures["tokens_out"]
        in_force = sampled(model, {**options, **setting.options})
        figures["settings"] = {**setting.options, **({"do_sample": True} if in_force else {}), "batch_size": batch_size}
        grades = _graded(measure, setting, prompts, texts[setting.name])
        figures["quality"], figures["quality_standard_error"] = measure.of(grades)
        figures["per_prompt"]["quality"] = grades.values
        if grades.weights is not None:
            figures["per_prompt"]["weight"] = grades.weights
        if also:
            figures["also"] = {}
            for other in also:
                value, error = other.of(_graded(other, setting, prompts, texts[setting.name]))
                figures["also"][other.name] = {"value": value, "standard_error": error}
        of_sizes = {size: latencies[setting.name, size] for size in latency_batch_sizes}
        rows.append(figures | _timings(first, timed, of_sizes))
    shown = [
        {"prompt": p.text, "target": p.target, "outputs": {s.name: texts[s.name][i] for s in settings}}
        for i, p in enumerate(prompts[:samples])
    ]
    return rows, shown


@dataclass
class _Meter:
    """Tells how far the work has come."""

    tell: Callable[[Progress], object]
    total: int
    before: int = 0  # batches of what is finished
    since: int = 0  # and of what is being run
    what: str = ""

    def begin(self, what: str) -> None:
        self.what = what
        self.tell(Progress(what, self.before, self.total))

    def batch(self) -> None:
        self.since += 1
        self.tell(Progress(self.what, self.before + self.since, self.total))

    def end(self, batches: int) -> None:
        """What came from the journal had no batches now, and what others ran none here."""
        self.before, self.since = self.before + batches, 0


def check_prompts(
    model: HybridForCausalLM, prompts: Sequence[Prompt], max_new_tokens: int, needs_targets: bool
) -> None:
    """Raise ValueError unless every prompt can be continued that far, and graded."""
    if not prompts:
        raise ValueError("prompts: there are none; give at least one held-out prompt.")
    room = model.config.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        if not prompt.ids:
            raise ValueError(f"prompts: number {number} is empty, and this model has no token to begin a text with.")
        if model.config.is_hybrid and model.config.mask_token_id in prompt.ids:
            raise ValueError(f"prompts: number {number} has the mask token in it, which only infilling takes: cut it.")
        if max(prompt.ids) >= model.config.vocab_size:
            raise ValueError(f"prompts: number {number} has a token that the model lacks: is this its tokenizer?")
        if len(prompt.ids) + max_new_tokens > room:
            raise ValueError(
                f"prompts: number {number} has {len(prompt.ids)} tokens, and with max_new_tokens={max_new_tokens} it "
                f"goes past the model's context of {room}: shorten it, or ask for fewer new tokens."
            )
        if needs_targets and not prompt.target:
            raise ValueError(
                f"prompts: number {number} has no target, which this quality compares with: give every prompt the "
                "true continuation, or choose a quality that needs none (judge_perplexity, parses)."
            )


def _check(
    prompts: Sequence[Prompt], settings: Sequence[Setting], batch_size: int, repeats: int, latency: Sequence[int]
) -> None:
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not settings:
        raise ValueError("settings: there are none; a sweep needs at least one.")
    if len({setting.name for setting in settings}) < len(settings):
        raise ValueError("settings: two have the same name; names tell rows apart.")
    for size in latency:
        if not 1 <= size <= len(prompts):
            raise ValueError(f"latency_batch_sizes: {size} is not between 1 and the {len(prompts)} prompts there are.")


def _graded(measure: Measure, setting: Setting, prompts: Sequence[Prompt], texts: Sequence[str]) -> Grades:
    grades = measure.grade(prompts, texts)
    if all(value is None for value in grades.values):
        raise ValueError(
            f"{setting.mode}, {setting.name}: all outputs are empty, so {measure.name} has nothing to grade, and "
            "without a quality there is no speed: ask for more new tokens, or leave the setting out."
        )
    return grades


@dataclass(kw_only=True)
class _Runs:
    """Passes over the prompts, each from the journal or made now."""

    model: HybridForCausalLM
    tokenizer: Any
    prompts: Sequence[Prompt]
    max_new_tokens: int
    batch_size: int
    seed: int
    journal: Journal | None
    shards: Shards
    options: Record

    def __post_init__(self) -> None:
        self.batches = -(-len(self.prompts) // self.batch_size)
        self.mine = self.shards.mine(len(self.prompts), self.batch_size)
        # All processes must agree on what is left to do.
        self.known = self.shards.share(self.journal.done if self.journal else {})
        self.about = {
            "hybrid": __version__, "environment": environment(self.model) | {"processes": self.shards.count},
            "model": fingerprint(self.model) if self.journal else None, "prompts": digest_of(self.prompts),
            "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "seed": self.seed,
        }  # fmt: skip

    def _kept(self, make: Callable[[], Record], **what: Any) -> Record:
        key = key_of(**self.about, **what)
        if (known := self.known.get(key)) is not None:
            return dict(known)
        record = make()
        if self.journal is not None and self.shards.rank == 0:
            self.journal.add(key, record)
        return record

    def one_pass(
        self, setting: Setting, turn: int, options: Record, *, watched: bool, told: Callable[[], None]
    ) -> Record:
        """All prompts once. The timed turns keep a hash of their tokens, to be held against the first turn's."""

        def make() -> Record:
            reveals: list[Reveals] = []

            def watch() -> Watcher:
                reveals.append(Reveals())
                return reveals[-1]

            memory = PeakMemory(self.model.device)
            found = decode(
                self.model, self.tokenizer, [self.prompts[i] for i in self.mine], setting,
                max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, seed=self.seed, numbers=self.mine,
                watch=watch if watched else None, after_batch=told, **options,
            )  # fmt: skip
            steps = sum((part.histogram for part in reveals), Counter[int]())
            own = {
                "tokens": found.tokens, "rows": [asdict(row) for s in found.stats for row in s.rows],
                "forwards": {kind: sum(getattr(s, kind) for s in found.stats) for kind in KINDS},
                "seconds": sum(s.seconds for s in found.stats),
                "first": [s.time_to_first_token for s in found.stats if s.time_to_first_token is not None],
                "memory": memory.bytes, "steps": {str(n): count for n, count in steps.items()},
            }  # fmt: skip
            return self._merged(self.shards.gather(own), keep_outputs=turn == 0)

        return self._kept(make, setting=[setting.mode, setting.options], options=options, turn=turn, watched=watched)

    def one_call(self, setting: Setting, turn: int, size: int) -> Record:
        """The first `size` prompts in one call, timed, in the first process."""

        def make() -> Record:
            if self.shards.rank:
                return dict(self.shards.share(None))
            found = decode(
                self.model, self.tokenizer, self.prompts[:size], setting, max_new_tokens=self.max_new_tokens,
                batch_size=size, seed=self.seed, **self.options,
            )  # fmt: skip
            (stats,) = found.stats
            own = {"tokens": found.tokens, "seconds": stats.seconds, "first": stats.time_to_first_token}
            return dict(self.shards.share(own))

        return self._kept(
            make, setting=[setting.mode, setting.options], options=self.options, turn=turn, latency=size
        )

    def _merged(self, parts: list[Record], keep_outputs: bool) -> Record:
        count, size = len(self.prompts), self.batch_size
        tokens, rows = (self.shards.merged([part[k] for part in parts], count, size) for k in ("tokens", "rows"))
        steps = sum((Counter(part["steps"]) for part in parts), Counter[str]())
        peaks = [part["memory"] for part in parts if part["memory"] is not None]
        record = {
            "digest": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
            "seconds": max(part["seconds"] for part in parts), "memory": max(peaks, default=None),
            "first": [first for part in parts for first in part["first"]],
        }  # fmt: skip
        if keep_outputs:
            forwards = {kind: sum(part["forwards"][kind] for part in parts) for kind in KINDS}
            record |= {"tokens": tokens, "rows": rows, "forwards": forwards, "steps": dict(steps)}
        return record


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Of the prompts' tokens and targets: results of other prompts do not compare."""
    return hashlib.sha256(json.dumps([[p.ids, p.target] for p in prompts]).encode()).hexdigest()


def prompts_record(prompts: Sequence[Prompt], *, source: str, max_new_tokens: int, seed: int) -> Record:
    """An act's `prompts`, for the results document."""
    return {
        "count": len(prompts), "sha256": digest_of(prompts), "source": source, "max_new_tokens": max_new_tokens,
        "seed": seed,
    }  # fmt: skip


KINDS = ("prefill", "settle", "draft")


def _figures(
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


def _timings(first: Record, timed: list[Record], latencies: dict[int, list[Record]]) -> Record:
    """What belongs to this machine and this hour."""
    count = sum(map(len, first["tokens"]))
    speeds = [count / turn["seconds"] for turn in timed]
    firsts = [statistics.median(turn["first"]) for turn in timed if turn["first"]]
    peaks = [turn["memory"] for turn in timed if turn["memory"] is not None]
    return {
        "tokens_per_second": statistics.median(speeds),
        "time_to_first_token": statistics.median(firsts) if firsts else None,
        "timing": {
            "repeats": len(timed),
            "tokens_per_second": _spread(speeds),
            "time_to_first_token": _spread(firsts),
            "peak_memory_bytes": max(peaks, default=None),
            "same_outputs": statistics.mean(float(turn["digest"] == first["digest"]) for turn in timed),
            "latency": [_latency(size, calls, first["tokens"]) for size, calls in latencies.items()],
        },
    }  # fmt: skip


def _latency(size: int, calls: list[Record], tokens: list[list[int]]) -> Record:
    pairs = [pair for call in calls for pair in zip(call["tokens"], tokens, strict=False)]
    return {
        "batch_size": size,
        "seconds": _spread([call["seconds"] for call in calls]),
        "tokens_per_second": _spread([sum(map(len, call["tokens"])) / call["seconds"] for call in calls]),
        "time_to_first_token": _spread([call["first"] for call in calls if call["first"] is not None]),
        "same_tokens": statistics.mean(agreement(*pair) for pair in pairs),
    }


def _spread(values: Sequence[float]) -> Record | None:
    """The median, the least and the most."""
    if not values:
        return None
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.mean(there) if there else None
