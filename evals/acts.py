"""An act of the results document: every mode and setting on the same prompts, each speed beside the quality of the same
outputs.

Each setting passes over the prompts 1 + `repeats` times. The first pass warms it up and is watched: it says how many
tokens each forward revealed. The others are timed, all settings in turn, so that a machine whose speed drifts is fair
to all.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid import HybridForCausalLM
from hybrid.evals.document import Act, Figure, PerPrompt, Prompts, Quality, Row, Sample
from hybrid.evals.laboratory.aup import aup_of
from hybrid.evals.laboratory.traces import trace_of
from hybrid.evals.likelihood import Likelihood, Text, written_nll
from hybrid.evals.measures import Grades, Measure, Score, aggregated, scored
from hybrid.evals.passes.figures import figures_of, speeds_of, timings_of
from hybrid.evals.passes.journal import Journal
from hybrid.evals.passes.outputs import Prompt, Setting
from hybrid.evals.passes.runs import Calls, Pass, Runs, digest_of
from hybrid.evals.passes.shards import ALONE, Shards
from hybrid.evals.prompts import check_prompts
from hybrid.evals.sweep import check_settings, sampled
from hybrid.law import Law
from hybrid.texts import decode

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


def act_of(
    model: HybridForCausalLM, tokenizer: Any, prompts: Sequence[Prompt], settings: Sequence[Setting], measure: Measure,
    *, name: str, title: str, place: str, source: str, max_new_tokens: int, also: Sequence[Measure] = (), seed: int = 0,
    options: Mapping[str, Any], about: Mapping[str, Any], **passes: Any,
) -> Act | None:  # fmt: skip
    """The act, or None in a process that only helps another (`shards`).

    Args:
        tokenizer: the model's.
        measure, also: of quality: the one of the picture, and more of the same outputs.
        name, title: of the act, for machines and for readers.
        place: where the model is from.
        source: where the prompts are from.
        max_new_tokens: how far each is continued.
        seed: of all sampling.
        options: of `generate`, for all settings.
        about: more fields of the act, such as its notes.
        passes: more of `frontier`.
    """
    rows, samples = frontier(
        model, tokenizer, prompts, settings, measure, also=also, max_new_tokens=max_new_tokens, seed=seed, **passes,
        **options,
    )  # fmt: skip
    if not rows:
        return None
    asked = Prompts(
        count=len(prompts), sha256=digest_of(prompts), source=source, max_new_tokens=max_new_tokens, seed=seed
    )
    act = Act(
        name=name, title=title, quality=measure.record(), also=[other.record() for other in also], prompts=asked,
        model=about_model(model, place), rows=rows, samples=samples, **about,
    )  # fmt: skip
    trace = trace_of(model, tokenizer, prompts[0], act, max_new_tokens=max_new_tokens, seed=seed, **options)
    return act.model_copy(update={"aup": aup_of(act), "trace": trace})


def likelihood_act(found: Sequence[Likelihood], text: Text, *, title: str, source: str) -> Act:
    """Likelihoods of one text as an act that `hybrid eval compare` reads: a row for each law, its grades those of the
    rows of the text."""
    counts = text.target.sum(1).tolist()
    asked = json.dumps([text.ids.tolist(), text.target.long().argmax(1).tolist(), counts])
    rows = []
    for one in found:
        values = [nats / count for nats, count in zip(one.rows, counts, strict=True)]
        quality, error = aggregated(values, counts, "mean")
        rows.append(Row(
            mode=one.law, setting=one.name, quality=quality, quality_standard_error=error, tokens_per_forward=None,
            per_prompt=PerPrompt(quality=list(values), weight=counts),
        ))  # fmt: skip
    unit = "nats per token"
    return Act(
        name="likelihood", title=title, quality=Quality(name=unit, unit=unit, higher_is_better=False), rows=rows,
        prompts=Prompts(count=len(counts), sha256=hashlib.sha256(asked.encode()).hexdigest(), source=source),
        likelihood=[one.record() for one in found],
    )  # fmt: skip


def about_model(model: HybridForCausalLM, place: str) -> dict[str, Any]:
    """What the document says of a model."""
    fields = ("block_size", "clean_attention", "vocab_size", "diffusion_prediction")
    return {
        "path": place, "parameters": model.num_parameters(), **{name: getattr(model.config, name) for name in fields}
    }


def frontier(
    model: HybridForCausalLM, tokenizer: Any, prompts: Sequence[Prompt], settings: Sequence[Setting],
    score: Score | Measure, *, max_new_tokens: int, batch_size: int = 32, repeats: int = 3, samples: int = 6,
    latency_batch_sizes: Sequence[int] = (), also: Sequence[Measure] = (), seed: int = 0,
    journal: Journal | None = None, shards: Shards = ALONE, progress: Callable[[Progress], object] = lambda _: None,
    **options: Any,
) -> tuple[list[Row], list[Sample]]:  # fmt: skip
    """Rows and samples for the results document.

    Greedy left-to-right decoding is the reference of `agreement`; it is run first, whether or not it is among the
    settings.

    Args:
        tokenizer: the model's.
        score: the quality: a function of prompt, output and target (which may then be empty), or a `Measure`.
        max_new_tokens: how far each prompt is continued.
        batch_size: prompts at once; it changes no figure of quality.
        repeats: timed passes of each setting, of which the median counts.
        samples: how many prompts to show with all outputs.
        latency_batch_sizes: also time single calls of this many prompts, the first ones; with 1 among them, rows say
            how many times as fast as ar they are for somebody who waits for one text.
        also: further measures of the same outputs.
        seed: of all sampling; a prompt's draws depend on it and on the prompt's number.
        journal: keeps every finished pass, and gives those that are in it already.
        shards: the processes that share the prompts; the first has the results, which are those of a single process
            but for times and for the number of batched forwards, and the others return empty lists.
        progress: told what is being run, and after each prompt.
        options: of `generate`, for all settings (`eos_token_id=...`).

    Raises:
        ValueError: no prompts, a prompt that does not fit the model or has no target where one is needed, two settings
            of one name, or a setting that the model cannot run.
    """
    measure = score if isinstance(score, Measure) else scored(score, targets=False)
    check_prompts(model, prompts, max_new_tokens, needs_targets=any(m.targets for m in (measure, *also)))
    _check(prompts, settings, batch_size, repeats, latency_batch_sizes)
    check_settings(model, settings, max(len(p.ids) for p in prompts), max_new_tokens, options)
    runs = Runs(
        model=model, tokenizer=tokenizer, prompts=prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
        seed=seed, journal=journal, shards=shards, options=options,
    )  # fmt: skip
    done = _run(runs, settings, repeats, latency_batch_sizes, progress)
    if shards.rank:
        return [], []
    texts = {
        setting.name: [
            decode(tokenizer, tokens, after=p.ids)
            for tokens, p in zip(done.first(setting).tokens, prompts, strict=True)
        ]
        for setting in settings
    }
    rows = [_row(runs, done, setting, texts[setting.name], measure, also) for setting in settings]
    shown = [
        Sample(prompt=p.text, target=p.target, outputs={s.name: texts[s.name][i] for s in settings})
        for i, p in enumerate(prompts[:samples])
    ]
    return rows, shown


@dataclass
class _Done:
    """What was run: by the name of a setting its passes, the one that is not timed first, and its turns of calls by
    batch size; and the tokens that all are compared with."""

    passes: dict[str, list[Pass]] = field(default_factory=dict)
    calls: dict[str, dict[int, list[Calls]]] = field(default_factory=dict)
    reference: list[list[int]] | None = None
    base: tuple[list[float], list[float]] = ([], [])  # speeds of ar, in passes and in calls of one prompt

    def first(self, setting: Setting) -> Pass:
        return self.passes[setting.name][0]


def _run(
    runs: Runs, settings: Sequence[Setting], repeats: int, sizes: Sequence[int],
    progress: Callable[[Progress], object],
) -> _Done:  # fmt: skip
    """All passes and calls, in turns."""
    plain = {k: v for k, v in runs.options.items() if k not in SAMPLING}
    greedy = Setting(name=REFERENCE, mode="ar", options={"do_sample": False})
    exact = Law.of(runs.model.config).exact
    plan: list[tuple[Setting, int, int | None]] = [(greedy, 0, None)] if exact else []
    for turn in range(1 + repeats):
        for setting in settings:
            plan.append((setting, turn, None))
            plan += [(setting, turn, size) for size in sizes if turn]
    done = _Done(calls={setting.name: {size: [] for size in sizes} for setting in settings})
    before, total = 0, sum(1 if size else len(runs.mine) for _, _, size in plan)
    for setting, turn, size in plan:
        what = f"{setting.mode}: {setting.name}" + (f", batch size {size}" if size else "")
        progress(Progress(what, before, total))
        if size is None:
            given, watched = (plain, False) if setting is greedy else (runs.options, turn == 0)
            done.passes.setdefault(setting.name, []).append(runs.one_pass(
                setting, turn, given, watched=watched,
                told=lambda n, what=what, before=before: progress(Progress(what, before + n, total)),  # type: ignore[misc]
            ))  # fmt: skip
        else:
            done.calls[setting.name][size].append(runs.timed_calls(setting, turn, size))
        # What came from the journal told of no prompt, and what others ran of none here.
        before += 1 if size else len(runs.mine)
    progress(Progress("grading the outputs", before, total))
    if exact and not runs.shards.rank:
        done.reference = done.first(greedy).tokens
    if (ar := next((s.name for s in settings if s.mode == "ar"), None)) is not None:
        first, *timed = done.passes[ar]
        done.base = speeds_of(first, timed), [turn.speed for turn in done.calls[ar].get(1, [])]
    return done


def _row(
    runs: Runs, done: _Done, setting: Setting, texts: Sequence[str], measure: Measure, also: Sequence[Measure]
) -> Row:
    """What a setting made of the prompts, graded."""
    model, prompts = runs.model, runs.prompts
    first, *timed = done.passes[setting.name]
    figures = figures_of(setting, first, prompts, texts, done.reference)
    nats = None
    if done.reference is not None and figures["tokens_out"]:
        written = written_nll(model, [p.ids for p in prompts], first.tokens)
        nats = float(written.sum()) / figures["tokens_out"]
    drawn = {"do_sample": True} if sampled(model, {**runs.options, **setting.options}) else {}
    grades = _graded(measure, setting, prompts, texts)
    quality, error = measure.of(grades)
    per = {"quality": grades.values, **figures.pop("per_prompt")}
    if grades.weights is not None:
        per["weight"] = grades.weights
    if also:
        figures["also"] = {}
        for other in also:
            value, spread = other.of(_graded(other, setting, prompts, texts))
            figures["also"][other.name] = Figure(value=value, standard_error=spread)
    return Row(
        mode=setting.mode, setting=setting.name, quality=quality, quality_standard_error=error, ar_nats_per_token=nats,
        settings={**setting.options, **drawn, "batch_size": runs.batch_size}, per_prompt=PerPrompt(**per),
        **figures, **timings_of(first, timed, done.calls[setting.name], done.base),
    )  # fmt: skip


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
