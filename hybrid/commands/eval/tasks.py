"""`hybrid eval tasks`: benchmarks of lm-evaluation-harness."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from hybrid.commands.console import cell, leave, table, wide_console
from hybrid.commands.eval.benchmark import show_ledger
from hybrid.commands.models import load, load_tokenizer
from hybrid.commands.options import Asked, On, check_counts, listed, named
from hybrid.evals.document import Act
from hybrid.evals.results import document_of, measured_act


def tasks(
    tasks: str = "",
    include: Path | None = None,
    max_gen_toks: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    asked: Asked = Asked(),
    on: On = On(),
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
    names = listed(tasks)
    if not names:
        raise ValueError("tasks: name at least one, for example --tasks arc_easy,gsm8k")
    check_counts(max_gen_toks=max_gen_toks)
    settings = asked.settings() | {"max_gen_toks": max_gen_toks}
    if include is not None and not include.is_dir():
        raise ValueError(f"include: there is no folder {include}; name one with YAML files of tasks.")
    given = named(asked.options, *settings, "pretrained", "tokenizer", "device", "dtype")
    try:
        from hybrid.evals.benchmarks.harness import HybridLM
    except ImportError as error:  # it is an extra
        raise ValueError(str(error)) from error
    from lm_eval import simple_evaluate

    manager = _manager(names, include)
    lm = HybridLM(load(asked.model, on), tokenizer=load_tokenizer(asked.model), **settings, **given)
    # Left to itself it would seed the random state of the whole process, which nothing here draws from.
    found = simple_evaluate(
        lm, tasks=names, num_fewshot=shots, limit=asked.limit, task_manager=manager, apply_chat_template=chat,
        random_seed=None, numpy_random_seed=None, torch_random_seed=None,
    )  # fmt: skip
    assert found is not None
    mode, likelihood = lm.answers.mode, lm.answers.likelihood
    wide_console().print(_table(f"{asked.model}: {mode}, likelihood {likelihood}", found["results"]))
    show_ledger(lm.answers)
    if asked.out is None:
        return
    kept = {key: found[key] for key in ("results", "configs", "versions", "n-shot", "n-samples") if key in found}
    settings |= {"options": given, "limit": asked.limit, "chat": chat}
    # A task's configuration has functions in it, and a figure may be NaN.
    plain = json.loads(json.dumps(kept, default=str), parse_constant=lambda _: None)
    acts = _acts(found, mode, likelihood)
    leave(asked.out, document_of(lm.answers.model, acts, model=asked.model, settings=settings, **plain).plain())


def _manager(names: list[str], include: Path | None) -> Any:
    """What knows these tasks."""
    from lm_eval.tasks import TaskManager

    own = None if include is None else str(include)
    # Reading the thousands of files that come with the harness takes seconds, so they are left for last.
    for defaults in (False, True):
        manager = TaskManager(include_path=own, include_defaults=defaults)
        missing = [name for name in names if not manager.match_tasks([name])]
        if not missing:
            return manager
    raise ValueError(f"tasks: no task {', '.join(missing)}; see `lm_eval ls tasks`, or --include your own folder.")


def _acts(found: dict[str, Any], mode: str, likelihood: str) -> list[Act]:
    """Of every task and metric; with a value a question where their mean is the figure."""
    acts = []
    for task, metric, which, value, error in _metrics(found["results"]):
        if value is None:
            continue
        samples = found.get("samples", {}).get(task) or []
        each = [s.get(metric) for s in samples if s.get("filter", which) == which]
        real = bool(each) and all(map(_figure, each))
        mean = real and math.isclose(sum(map(float, each)) / len(each), value, rel_tol=1e-9, abs_tol=1e-12)
        row = {"value": value, "standard_error": error, "values": [float(x) for x in each] if mean else None}
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


def _metrics(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str, float | None, float | None]]:
    """Task, metric, filter, value and standard error; None for what is no number."""
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, which = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{which}")
                yield task, metric, which, value if _figure(value) else None, error if _figure(error) else None


def _figure(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _table(title: str, results: dict[str, dict[str, Any]]) -> Table:
    rows = ([*words, cell(value, ".4f"), cell(error, ".4f")] for *words, value, error in _metrics(results))
    return table(title, "task", "metric", "filter", "value", "±", rows=rows, words=5)
