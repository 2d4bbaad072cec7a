"""`hybrid eval frontier`: quality against speed of every mode and setting on the same prompts."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hybrid.commands.console import Bar, wide_console
from hybrid.commands.eval.prompts import ASKED, NAMES, Source, source_of
from hybrid.commands.models import load, load_tokenizer
from hybrid.commands.options import On
from hybrid.evals.acts import act_of
from hybrid.evals.document import Act, Limit
from hybrid.evals.laboratory.judge import load_judge, same_weights
from hybrid.evals.likelihood import score, text_of
from hybrid.evals.measures import Measure, judged, measures
from hybrid.evals.passes.journal import Journal
from hybrid.evals.passes.shards import shards_of_environment
from hybrid.evals.prompts import load_prompts
from hybrid.evals.report import log_results, write_report
from hybrid.evals.results import document_of, read
from hybrid.evals.sweep import load_sweep
from hybrid.evals.table import shown


@dataclass(frozen=True, kw_only=True)
class Judged:
    """How outputs are graded.

    Args:
        quality: measures of quality separated by commas, the first for the picture: edit_similarity, exact_match,
            parses, judge_perplexity, judge_bits_per_byte, and solved for puzzles (default: what the prompts come with,
            else edit_similarity).
        judge: folder of another causal model, for judge_perplexity and judge_bits_per_byte.
        allow_self_judge: let the judge be the model itself, and say so in the report.
    """

    quality: str | None = None
    judge: str | None = None
    allow_self_judge: bool = False


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often prompts are decoded, and how many at once.

    Args:
        max_new_tokens: how far each prompt is continued (default: 64; an answer's length for puzzles).
        count: use the first of the prompts only, this many.
        batch_size: prompts decoded at once; it changes no score.
        repeats: timed passes of each setting, in turn, of which the median counts; one more goes before as a warm-up.
        latency_batch_sizes: also time single calls of this many prompts (default: 1 and 8).
        seed: of all sampling.
    """

    max_new_tokens: int | None = None
    count: int | None = None
    batch_size: int = 32
    repeats: int = 3
    latency_batch_sizes: tuple[int, ...] | None = None
    seed: int = 0

    def sizes(self, prompts: int) -> tuple[int, ...]:
        """Of single calls."""
        if self.latency_batch_sizes is None:
            return tuple(size for size in (1, 8) if size <= prompts)
        return self.latency_batch_sizes


def frontier(
    model: str = "hybrid-stdlib",
    prompts: str = "stdlib",
    sweep: str = "default",
    out: Path = Path("runs/frontier"),
    judged: Judged = Judged(),
    passes: Passes = Passes(),
    likelihood: bool = False,
    ceiling: Path | None = None,
    samples: int = 6,
    on: On = On(),
    wandb: Literal["offline", "online"] | None = None,
    fresh: bool = False,
) -> None:
    """Decode prompts in every mode and setting: tables, pictures and a page of quality against speed.

    Every setting of the sweep continues the same prompts, and its quality is that of the very outputs whose speed is
    shown. Leaves report.html, frontier.png, frontier.svg, frontier.csv and results.json in --out, and in journal.jsonl
    what is finished: after a kill or Ctrl-C the same command goes on there. `torchrun --nproc-per-node 2 -m hybrid
    eval frontier ...` shares the prompts out to processes; but for the times, the results are those of one.

    Example: `hybrid eval frontier --prompts stdlib --model runs/stdlib`.

    Args:
        model: folder of a trained model, hub name or shipped model.
        prompts: a JSON Lines file, each line with "prompt" (or "messages", a conversation) and mostly "target", the
            true continuation; or "stdlib" for held-out places in Python's standard library; or held-out puzzles, whose
            answers are checked: "sudoku" (those of quickstart), "sudoku4", "sudoku6", "countdown", or a recipe (.yaml)
            with data of this kind, also the config.yaml in a job's logs.
        sweep: a YAML file of settings, or a packaged one: "default", a first look at every mode, which explains the
            form; "full", more of each; or "orders", what any-order decoding buys over left to right.
        out: folder for everything.
        likelihood: also score the targets by each decoding law, exactly or by a bound.
        ceiling: what `hybrid eval ceiling --out` found for this model and these prompts, to be drawn.
        samples: prompts shown with the outputs of all settings.
        wandb: also log tables, pictures and an artifact to Weights & Biases; "offline" needs no account.
        fresh: forget what --out/journal.jsonl holds, and measure everything anew.
    """
    for name, value in (("count", passes.count), ("max_new_tokens", passes.max_new_tokens), ("samples", samples + 1)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")

    shards, console = shards_of_environment(), wide_console()
    loaded, tokenizer = load(model, on), load_tokenizer(model)
    swept = load_sweep(sweep, loaded)
    source = _source(prompts, loaded, tokenizer, passes.count, passes.max_new_tokens)
    axis, *also = _measures(judged, source, loaded)
    about: dict[str, Any] = {
        "notes": [*swept.skipped, *axis.notes, *_of_the_truth(judged, source, axis)],
        "ceiling": None if ceiling is None else _ceiling(ceiling, model, prompts, source.max_new_tokens),
    }
    scored = text_of(tokenizer, source.prompts, loaded) if likelihood else None
    act = _measured(
        loaded, tokenizer, source, swept.settings, axis, passes, out, fresh, shards, also=also, name="frontier",
        title=f"{Path(model).name} on {Path(prompts).name}", place=model, source=prompts, samples=samples, about=about,
        options={**source.options, **swept.options},
    )  # fmt: skip
    if act is None:
        return
    if scored is not None:
        found = score(loaded, scored, block_sizes=(loaded.config.block_size,))
        act = act.model_copy(update={"likelihood": [entry.record() for entry in found]})
    document = document_of(loaded, [act], processes=shards.count)
    page = write_report(document, out)
    console.print(*shown(act), sep="\n")
    console.print(f"The page with everything: {page}")
    if wandb is not None:
        log_results(document, out, wandb)


def _of_the_truth(judged: Judged, source: Source, axis: Measure) -> list[str]:
    """What the judge says of the true continuations; before the long work: it also shows that it can read them."""
    if judged.judge is None or not all(p.target for p in source.prompts):
        return []
    true, _ = axis.of(axis.grade(source.prompts, [p.target for p in source.prompts]))
    return [f"The true continuations have {axis.name} {true:.4g}."]


def _measured(
    model: Any, tokenizer: Any, prompts: Source, settings: Any, axis: Measure, passes: Passes, out: Path,
    fresh: bool, shards: Any, **more: Any,
) -> "Act | None":  # fmt: skip
    """The act, what is in the journal left as it is."""
    journal = None
    if shards.rank == 0:
        if fresh:
            (out / "journal.jsonl").unlink(missing_ok=True)
        journal = Journal(out / "journal.jsonl")
    with Bar(shown=shards.rank == 0) as bar:
        task = bar.begin("decoding")
        try:
            return act_of(
                model, tokenizer, prompts.prompts, settings, axis, batch_size=passes.batch_size,
                max_new_tokens=prompts.max_new_tokens, repeats=passes.repeats, seed=passes.seed,
                latency_batch_sizes=passes.sizes(len(prompts.prompts)), journal=journal, shards=shards,
                progress=lambda now: bar.tell(task, now.done, description=now.what, total=now.total), **more,
            )  # fmt: skip
        except KeyboardInterrupt:
            print("\nInterrupted. What is finished is kept; the same command goes on there.", file=sys.stderr)
            sys.exit(130)


def _source(name: str, model: Any, tokenizer: Any, count: int | None, max_new_tokens: int | None) -> Source:
    if name in NAMES or Path(name).suffix in (".yaml", ".yml"):
        return source_of(name, model, tokenizer, count, max_new_tokens)
    if not Path(name).exists():
        raise ValueError(f"prompts: there is no file {name}; name one, or {', '.join(NAMES)}.")
    found = load_prompts(Path(name), model, tokenizer)[:count]
    return Source(prompts=found, max_new_tokens=max_new_tokens or ASKED, quality="edit_similarity")


def _measures(asked: Judged, source: Source, writer: Any) -> list[Measure]:
    names, judge, allow_self = asked.quality or source.quality, asked.judge, asked.allow_self_judge
    judges = {f"judge_{per}": per for per in ("perplexity", "bits_per_byte")}
    known = measures() | source.measures
    wanted = [name.strip().replace("-", "_") for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known and name not in judges:
            raise ValueError(f"quality: there is no measure {name!r} here; use {', '.join([*known, *judges])}.")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"quality is {names!r}; name at least one measure, and each once.")
    if not set(wanted) & set(judges):
        if judge is not None or allow_self:
            raise ValueError("judge: only judge_perplexity and judge_bits_per_byte ask it; add one to --quality.")
        return [known[name] for name in wanted]
    if judge is None:
        name = next(name for name in wanted if name in judges)
        raise ValueError(f"quality: {name} needs --judge, the folder of another model.")
    grader, own = load_judge(judge)
    if not allow_self and same_weights(grader, writer):
        raise ValueError(
            f"judge: {judge} has the weights of the model itself, and a model likes its own words. Use another judge, "
            "or --allow-self-judge to have it said in the report."
        )
    found = {
        name: judged(grader, own, writer, folder=judge, allow_self=allow_self, per=per) for name, per in judges.items()
    }
    return [(known | found)[name] for name in wanted]


def _ceiling(path: Path, model: str, prompts: str, max_new_tokens: int) -> "list[Limit]":
    """What `hybrid eval ceiling` wrote, of the same model and prompts: another's would be no ceiling."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"ceiling: {path} is not JSON ({error}).") from error
    if not isinstance(found, dict) or not isinstance(found.get("ceilings"), list) or not found["ceilings"]:
        raise ValueError(f"ceiling: {path} has no list `ceilings`; name what `hybrid eval ceiling --out` wrote.")
    for name, value in (("model", model), ("prompts", prompts), ("max_new_tokens", max_new_tokens)):
        if found.get(name) != value:
            raise ValueError(f"ceiling: {path} is of {name} {found.get(name)!r}, and this run of {value!r}.")
    return [read(Limit, entry, str(path), f"ceilings[{i}]") for i, entry in enumerate(found["ceilings"])]
