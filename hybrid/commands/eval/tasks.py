"""`hybrid eval tasks`: benchmarks of lm-evaluation-harness."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.commands.options import Asked

if TYPE_CHECKING:
    from hybrid.evals.document import Act


def tasks(
    tasks: str = "",
    include: Path | None = None,
    max_gen_toks: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    asked: Asked = Asked(),
) -> None:
    """Run tasks of lm-evaluation-harness (extra `eval`), its own or yours.

    A task is a YAML file (see that project's documentation); those in --include need no network where their data is
    local. Questions with choices are answered by likelihood, exactly or by a bound; open ones by generating in --mode.

    Example: `hybrid eval tasks --tasks arc_easy,gsm8k --model runs/mine --limit 100`.

    Args:
        tasks: names of tasks, separated by commas.
        include: folder with YAML files of your own tasks.
        max_gen_toks: tokens an answer at most, where the task does not say.
        shots: solved examples before each question (default: the task's).
        chat: put questions through the model's chat template.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("tasks: name at least one, for example --tasks arc_easy,gsm8k")
    asked.check()
    if include is not None and not include.is_dir():
        raise ValueError(f"include: there is no folder {include}; name one with YAML files of tasks.")
    try:
        from hybrid.evals.benchmarks.harness import HybridLM
    except ImportError as error:
        raise ValueError(str(error)) from error
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import simple_parse_args_string

    from hybrid.commands.console import wide_console
    from hybrid.commands.generate import load, load_tokenizer
    from hybrid.evals.results import document_of, write_results

    def unknown(manager: Any) -> list[str]:
        return [name for name in names if not manager.match_tasks([name])]

    own = None if include is None else str(include)
    manager = TaskManager(include_path=own, include_defaults=False)
    if unknown(manager):  # reading the thousands of files that come with the harness takes seconds
        manager = TaskManager(include_path=own)
    if missing := unknown(manager):
        raise ValueError(f"tasks: no task {', '.join(missing)}; see `lm_eval ls tasks`, or --include your own folder.")
    try:
        given = simple_parse_args_string(asked.options)
    except (ValueError, IndexError) as error:
        raise ValueError(f"options is {asked.options!r}; write name=value,name=value") from error
    settings: dict[str, Any] = {
        "mode": asked.mode, "likelihood": asked.likelihood, "likelihood_block_size": asked.likelihood_block_size,
        "samples": asked.samples, "max_gen_toks": max_gen_toks, "batch_size": asked.batch_size, "seed": asked.seed,
    }  # fmt: skip
    if twice := sorted(set(given) & (set(settings) | {"pretrained", "tokenizer"})):
        raise ValueError(f"options: {', '.join(twice)} has an option of its own, --{twice[0]}.")
    lm = HybridLM(load(asked.model), tokenizer=load_tokenizer(asked.model), **settings, **given)
    # Left to itself it would seed the random state of the whole process, which nothing here draws from.
    found = simple_evaluate(
        lm, tasks=names, num_fewshot=shots, limit=asked.limit, task_manager=manager, apply_chat_template=chat,
        random_seed=None, numpy_random_seed=None, torch_random_seed=None,
    )  # fmt: skip
    assert found is not None
    console = wide_console()
    console.print(_table(f"{asked.model}: {lm.answers.mode}, likelihood {lm.answers.likelihood}", found["results"]))
    if stats := lm.answers.stats:
        ledger = type(stats[0])(stats[0].mode, [row for each in stats for row in each.rows])
        per = ledger.tokens_per_forward
        console.print(f"{ledger.tokens} tokens generated" + (f", {per:.2f} a forward" if per is not None else ""))
    if asked.out is not None:
        kept = {key: found[key] for key in ("results", "configs", "versions", "n-shot", "n-samples") if key in found}
        settings |= {"options": given, "limit": asked.limit, "chat": chat}
        acts = _acts(found, lm.answers.mode, lm.answers.likelihood)
        # A task's configuration has functions in it, and a figure may be NaN.
        plain = json.loads(json.dumps(kept, default=str), parse_constant=lambda _: None)
        document = document_of(lm.answers.model, acts, model=asked.model, settings=settings, **plain)
        write_results(document, asked.out)
        console.print(f"Everything: {asked.out}")


def _acts(found: dict[str, Any], mode: str, likelihood: str) -> "list[Act]":
    """Of every task and metric; with a value a question where their mean is the figure."""
    from hybrid.evals.results import measured_act

    acts = []
    for task, values in found["results"].items():
        samples = found.get("samples", {}).get(task) or []
        for key, value in values.items():
            metric, comma, which = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _figure(value):
                continue
            each = [s.get(metric) for s in samples if s.get("filter", which) == which]
            real = bool(each) and all(map(_figure, each))
            mean = real and math.isclose(sum(map(float, each)) / len(each), value, rel_tol=1e-9, abs_tol=1e-12)
            error = values.get(f"{metric}_stderr,{which}")
            row = {
                "value": value, "standard_error": error if _figure(error) else None,
                "values": [float(x) for x in each] if mean else None,
            }  # fmt: skip
            better = found.get("higher_is_better", {}).get(task, {}).get(metric, True) is not False
            written = any(s.get("arguments") and "until" in str(s["arguments"]) for s in samples[:1])
            acts.append(
                measured_act(
                    task, {(mode if written else likelihood, which): row}, metric=metric,
                    unit="share" if better and 0 <= value <= 1 else metric, higher_is_better=better,
                    questions=[s.get("doc_hash") for s in samples if s.get("filter", which) == which],
                )
            )  # fmt: skip
    return acts


def _figure(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _table(title: str, results: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("task", "metric", "filter", "value", "±", title=title, title_justify="left")
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, which = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{which}")
                numbers = [f"{x:.4f}" if isinstance(x, int | float) else "–" for x in (value, error)]
                table.add_row(task, metric, which, *numbers)
    return table
