"""`hybrid eval frontier`: quality against speed of every mode and setting on the same prompts."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybrid.commands.options import On

if TYPE_CHECKING:
    from hybrid.commands.eval.prompts import Source
    from hybrid.evals.measures import Measure


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
    from hybrid.commands.console import wide_console
    from hybrid.commands.models import load, load_tokenizer
    from hybrid.evals.laboratory.aup import aup_of
    from hybrid.evals.laboratory.traces import trace_of
    from hybrid.evals.passes.shards import shards_of_environment
    from hybrid.evals.report import write_report
    from hybrid.evals.results import check_results, document_of
    from hybrid.evals.sweep import load_sweep
    from hybrid.evals.table import frontier_table, likelihood_table, takeaway
    from hybrid.evals.tracking import log_results

    shards, console = shards_of_environment(), wide_console()
    loaded, tokenizer = load(model, on), load_tokenizer(model)
    swept = load_sweep(sweep, loaded)
    source = _source(prompts, loaded, tokenizer, passes.count, passes.max_new_tokens)
    axis, *also = _measures(judged, source, loaded)
    act = _act(loaded, model, prompts, source, axis, also, passes.seed)
    act["notes"] = [*swept.skipped, *axis.notes, *_of_the_truth(judged, source, axis)]
    act["ceiling"] = None if ceiling is None else _ceiling(ceiling, model, prompts, source.max_new_tokens)
    document = document_of(loaded, [act])
    document["environment"]["processes"] = shards.count
    check_results(document, str(ceiling or "the results document"))
    options = {**source.options, **swept.options}
    act["rows"], act["samples"] = _measured(
        loaded, tokenizer, source, swept.settings, axis, also, passes, samples, out, fresh, shards, options
    )
    if shards.rank:
        return
    act["aup"] = aup_of(act)
    act["trace"] = trace_of(
        loaded, tokenizer, source.prompts[0], act, max_new_tokens=source.max_new_tokens, seed=passes.seed, **options
    )
    if likelihood:
        act["likelihood"] = _likelihood(loaded, tokenizer, source)
    page = write_report(document, out)
    console.print(frontier_table(act))
    if likelihood:
        console.print(likelihood_table(act))
    for line in (*act["notes"], takeaway(act)):
        if line:
            console.print(line)
    console.print(f"The page with everything: {page}")
    if wandb is not None:
        log_results(document, out, wandb)


def _act(
    model: Any, place: str, prompts: str, source: "Source", axis: "Measure", also: "list[Measure]", seed: int
) -> dict[str, Any]:
    from hybrid.evals.frontier import prompts_record

    config = model.config
    return {
        "name": "frontier", "title": f"{Path(place).name} on {Path(prompts).name}", "rows": [],
        "quality": axis.record(), "also": [other.record() for other in also],
        "prompts": prompts_record(source.prompts, source=prompts, max_new_tokens=source.max_new_tokens, seed=seed),
        "model": {
            "path": place, "parameters": model.num_parameters(), "block_size": config.block_size,
            "clean_attention": config.clean_attention, "vocab_size": config.vocab_size,
            "diffusion_prediction": config.diffusion_prediction,
        },
    }  # fmt: skip


def _of_the_truth(judged: Judged, source: "Source", axis: "Measure") -> list[str]:
    """What the judge says of the true continuations; before the long work: it also shows that it can read them."""
    if judged.judge is None or not all(p.target for p in source.prompts):
        return []
    true, _ = axis.of(axis.grade(source.prompts, [p.target for p in source.prompts]))
    return [f"The true continuations have {axis.name} {true:.4g}."]


def _measured(
    model: Any, tokenizer: Any, source: "Source", settings: Any, axis: "Measure", also: "list[Measure]", passes: Passes,
    samples: int, out: Path, fresh: bool, shards: Any, options: dict[str, Any],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Rows and samples, what is in the journal left as it is."""
    from hybrid.commands.console import Bar
    from hybrid.evals.frontier import frontier as measure
    from hybrid.evals.passes.journal import Journal

    journal = None
    if shards.rank == 0:
        if fresh:
            (out / "journal.jsonl").unlink(missing_ok=True)
        journal = Journal(out / "journal.jsonl")
    with Bar(shown=shards.rank == 0) as bar:
        task = bar.begin("decoding")
        try:
            return measure(
                model, tokenizer, source.prompts, settings, axis, also=also, batch_size=passes.batch_size,
                max_new_tokens=source.max_new_tokens, repeats=passes.repeats, samples=samples, seed=passes.seed,
                latency_batch_sizes=passes.sizes(len(source.prompts)), journal=journal, shards=shards,
                progress=lambda now: bar.tell(task, now.done, description=now.what, total=now.total), **options,
            )  # fmt: skip
        except KeyboardInterrupt:
            print("\nInterrupted. What is finished is kept; the same command goes on there.", file=sys.stderr)
            sys.exit(130)


def _source(name: str, model: Any, tokenizer: Any, count: int | None, max_new_tokens: int | None) -> "Source":
    from hybrid.commands.eval.prompts import ASKED, NAMES, Source, source_of
    from hybrid.evals.prompts import load_prompts

    if name in NAMES or Path(name).suffix in (".yaml", ".yml"):
        return source_of(name, model, tokenizer, count, max_new_tokens)
    if not Path(name).exists():
        raise ValueError(f"prompts: there is no file {name}; name one, or {', '.join(NAMES)}.")
    found = load_prompts(Path(name), model, tokenizer)[:count]
    return Source(prompts=found, max_new_tokens=max_new_tokens or ASKED, quality="edit_similarity")


def _measures(asked: Judged, source: "Source", writer: Any) -> "list[Measure]":
    from hybrid.evals.laboratory.judge import load_judge, same_weights
    from hybrid.evals.measures import judged, measures

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


def _ceiling(path: Path, model: str, prompts: str, max_new_tokens: int) -> list[dict[str, Any]]:
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
    return list(found["ceilings"])


def _likelihood(model: Any, tokenizer: Any, source: "Source") -> list[dict[str, Any]]:
    """Of the targets, each after its prompt."""
    import torch

    from hybrid.evals.likelihood import Text, score
    from hybrid.texts import encode_behind

    found = [p for p in source.prompts if p.target]
    pairs = [(p.ids, encode_behind(tokenizer, p.target, "prompts: a target"), p.target) for p in found]
    if not pairs:
        raise ValueError("likelihood: no prompt has a target to score; leave --likelihood out.")
    longest = max(len(given) + len(scored) for given, scored, _ in pairs)
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"likelihood: a prompt and its target have {longest} tokens, more than the model's context.")
    ids = torch.tensor([a + b + [a[0]] * (longest - len(a) - len(b)) for a, b, _ in pairs])
    target = torch.zeros_like(ids, dtype=torch.bool)
    for row, (given, scored, _) in enumerate(pairs):
        target[row, len(given) : len(given) + len(scored)] = True
    text = Text(ids=ids, target=target, size=sum(len(t.encode(errors="replace")) for _, _, t in pairs))
    sizes = (model.config.block_size,)
    return [entry.record() for entry in score(model, text, block_sizes=sizes)]
