"""`hybrid eval ceiling`: how fast block decoding could be, and what the reveal rules reach of it."""

from pathlib import Path
from typing import Any

from rich.table import Table

from hybrid.commands.console import Bar, cell, leave, table, wide_console, write_json
from hybrid.commands.models import load, load_tokenizer
from hybrid.commands.options import On, check_counts, check_file, listed
from hybrid.evals.laboratory.ceiling import ceiling as find
from hybrid.evals.laboratory.ceiling import reached
from hybrid.evals.prompts import load_prompts
from hybrid.evals.timing.machine import environment
from hybrid.sampling.reveal import options
from hybrid.sampling.reveal import rules as known

RULES = "threshold=0.9,threshold=0.7,factor=1,entropy_bound=0.1,steps=2"

# What the table shows of a rule, and how.
COLUMNS = {
    "tokens_per_forward": ".2f", "tokens_per_draft": ".2f", "of_ceiling": ".1%", "agreement": ".1%",
    "ar_nats_per_token": ".2f", "distinct_2": ".1%",
}  # fmt: skip


def ceiling(
    prompts: Path,
    model: str = "hybrid-stdlib",
    block_sizes: tuple[int, ...] = (4, 8, 16),
    rules: str = RULES,
    max_new_tokens: int = 64,
    budget: int = 5000,
    exhaustive: bool = False,
    skip_wrong: bool = False,
    limit: int | None = None,
    batch_size: int = 16,
    out: Path | None = None,
    on: On = On(),
) -> None:
    """Find the speed of light of block decoding: the ceiling of rules that show the surest drafts first.

    Showing one token a draft, the surest, defines the text. An oracle that knows it shows as many of the surest at
    once as still lead to that text (Nemotron-Labs-Diffusion, arXiv 2607.05722). What it needs is a ceiling, found
    within the budget, for this model at each block size; beside it stand the rules of --rules on the same prompts, and
    how much of their text is the same.

    Example: `hybrid eval ceiling prompts.jsonl --block-sizes "[4,8]" --limit 8`.

    Args:
        prompts: a JSON Lines file, each line with "prompt" and "target", as for `hybrid eval frontier`.
        model: folder of a trained model, hub name or shipped model.
        block_sizes: windows, each with a ceiling of its own.
        rules: reveal rules to compare with, as name=value separated by commas; the value is the rule's first option.
        max_new_tokens: how far each prompt is continued.
        budget: forwards a block that the search may take.
        exhaustive: spend what is left of the budget on all other sequences; where that ends, the ceiling is the
            optimum and not only the best that was found.
        skip_wrong: let the oracle leave wrong guesses out and show less sure ones, as no rule on confidence could.
        limit: only this many prompts.
        batch_size: canvases or prompts in one forward; it changes no result.
        out: file for the result, as JSON; its "ceilings" are what `hybrid eval frontier` draws.
    """
    chosen = _rules(rules)
    check_counts(limit=limit, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_file("out", out)
    if not block_sizes:
        raise ValueError("block_sizes: name at least one.")
    loaded, tokenizer, console = load(model, on), load_tokenizer(model), wide_console()
    rows = [prompt.ids for prompt in load_prompts(prompts, loaded, tokenizer)[:limit]]
    found: list[dict[str, Any]] = []
    document = {
        "model": model, "prompts": str(prompts), "max_new_tokens": max_new_tokens, "budget": budget,
        "exhaustive": exhaustive, "skip_wrong": skip_wrong, "environment": environment(loaded), "ceilings": found,
    }  # fmt: skip
    with Bar() as bar:
        for size in block_sizes:
            task = bar.begin(f"blocks of {size}", len(rows))
            best = find(
                loaded, rows, block_size=size, max_new_tokens=max_new_tokens, budget=budget, exhaustive=exhaustive,
                skip_wrong=skip_wrong, batch_size=batch_size,
                progress=lambda done, task=task: bar.tell(task, done),  # type: ignore[misc]
            )  # fmt: skip
            reach = reached(loaded, rows, best, chosen, max_new_tokens=max_new_tokens, batch_size=batch_size)
            found.append(best.record() | {"rules": reach})
            write_json(out, document)  # an interrupt leaves the sizes that are finished
    console.print(_table(f"{model} on {prompts.name}: the ceiling of block decoding", found))
    leave(out, document)


def _rules(text: str) -> dict[str, dict[str, Any]]:
    """Options of `generate` by the name to show."""
    found: dict[str, dict[str, Any]] = {}
    for word in listed(text):
        name, equals, value = word.partition("=")
        if name not in known():
            raise ValueError(f"rules: there is no rule {name!r}; use {', '.join(known())}.")
        found[word] = {"reveal": name}
        if equals:
            if not options(name):
                raise ValueError(f"rules: {word!r}: the rule {name} has no option; leave the value out.")
            try:
                found[word][options(name)[0]] = int(value) if value.isdigit() else float(value)
            except ValueError:
                raise ValueError(f"rules: {word!r}: {value!r} is not a number.") from None
        known()[name](**{key: x for key, x in found[word].items() if key != "reveal"})  # complains before the search
    return found


def _table(title: str, found: list[dict[str, Any]]) -> Table:
    headings = (
        "block size", "rule", "tokens per forward", "tokens per draft", "of the ceiling", "same text",
        "ar nats a token", "distinct-2",
    )  # fmt: skip
    shown = table(title, *headings, words=2)
    shown.columns[1].no_wrap, shown.caption_justify = True, "left"
    shown.caption = (
        "The ceiling is that of rules which keep the text that one token a draft writes; where less than 100% of the "
        "text is the same, a rule may be above it."
    )

    for row in found:
        proven = "the optimum" if row["optimal_share"] == 1 else "found"
        if row["budget_exhausted_share"]:
            proven += f", budget spent in {row['budget_exhausted_share']:.0%} of blocks"
        likely = row["rules"]["one a draft"]["ar_nats_per_token"]  # the ceiling is of that very text
        ceiling = row | {"of_ceiling": 1, "agreement": 1, "ar_nats_per_token": likely}
        for name, figures in {f"ceiling ({proven})": ceiling, **row["rules"]}.items():
            cells = (cell(figures[key], form) for key, form in COLUMNS.items())
            shown.add_row(str(row["block_size"]), name, *cells, style="bold" if figures is ceiling else "")
    return shown
