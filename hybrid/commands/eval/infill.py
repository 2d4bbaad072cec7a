"""`hybrid eval infill`: gaps in Python code, filled with both sides seen."""

from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from hybrid.commands.console import Bar, cell, leave, table, wide_console
from hybrid.commands.eval.likelihood import STDLIB, text_of
from hybrid.commands.models import load, load_tokenizer
from hybrid.commands.options import On, check_counts, check_file, named
from hybrid.evals.laboratory.infilling import fill, gaps
from hybrid.evals.results import document_of, measured_act
from hybrid.training.tasks.stdlib import load_stdlib


def infill(
    source: str = "stdlib",
    model: str = "hybrid-stdlib",
    kind: Literal["expression", "line", "body"] = "line",
    options: str = "",
    max_gap: int = 32,
    limit: int | None = 200,
    batch_size: int = 16,
    out: Path | None = None,
    on: On = On(),
) -> None:
    """Fill gaps in functions that the model was not trained on, and compare with what stood there.

    Of each function one piece is cut out; the model sees the rest of it, on both sides, and is told how many tokens
    are missing. Beside it stands what greedy left-to-right decoding of the same model writes there, which sees the
    left side only. Nothing is executed: code is parsed.

    Example: `hybrid eval infill --kind line --limit 50`.

    Args:
        source: "stdlib", the files of Python's standard library that the recipes hold out for testing; or a Python
            file, or a folder of them.
        model: folder of a trained model, hub name or shipped model.
        kind: what is cut out: an "expression" that is returned or assigned, a "line", or the "body".
        options: of infill, as name=value separated by commas: confidence_threshold=0.8,block_size=8
        max_gap: tokens of a gap at most.
        limit: only this many gaps, evenly spread over the functions that there are.
        batch_size: gaps at once; it changes no result.
        out: file for all figures and filled texts, as JSON.
    """
    check_counts(limit=limit, max_gap=max_gap, batch_size=batch_size)
    check_file("out", out)
    given = named(options, "max_gap", "limit", "batch_size")
    found = [gap for name, text in _sources(source) for gap in gaps(text, name, kind)]
    if not found:
        raise ValueError(f"source: {source} has no function with such a piece ({kind}).")
    if limit is not None:  # four times as many, as some are too long
        step = max(1, len(found) // (4 * limit))
        found = [*found[::step], *(gap for i, gap in enumerate(found) if i % step)]
    loaded, tokenizer, console = load(model, on), load_tokenizer(model), wide_console()
    with Bar() as bar:
        task = bar.begin("filling gaps")
        result = fill(
            loaded, tokenizer, found, max_gap=max_gap, limit=limit, batch_size=batch_size,
            progress=lambda done, total: bar.tell(task, done, total=total), **given,
        )  # fmt: skip
    console.print(_table(f"{model}: {result['gaps']} gaps ({kind}) in {source}", result))
    if out is not None:
        ways = {("infill", "both sides"): result, ("ar", "left side"): result.get("left_to_right")}
        asked = [[answer["name"], answer["truth"]] for answer in result["answers"]]
        acts = [
            measured_act(
                f"infill {kind}", {at: way[metric] for at, way in ways.items() if way is not None}, unit="share",
                metric=metric.replace("_", " "), higher_is_better=True, questions=asked,
            )
            for metric in ("edit_similarity", "exact_match", "parses")
        ]  # fmt: skip
        more = {"model": model, "source": source, "kind": kind, "options": given, "max_gap": max_gap, **result}
        leave(out, document_of(loaded, acts, **more).plain())


def _sources(source: str) -> list[tuple[str, str]]:
    """Names and texts."""
    if source == STDLIB:
        return [(document.name, document.text) for document in load_stdlib().test]
    path = Path(source)
    if not path.exists():
        raise ValueError(f"source: there is no {source}; name a Python file or a folder of them, or stdlib.")
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"source: {source} holds no Python file.")
    return [(file.name, text_of(file, "source")) for file in files]


def _table(title: str, result: dict[str, Any]) -> Table:
    shown = table(title, "way", "exact match", "edit similarity", "parses", "tokens per forward", "distinct-2")
    ways = {"infill": result, "left to right": result.get("left_to_right")}
    for way, figures in ((way, figures) for way, figures in ways.items() if figures is not None):
        cells = []
        for name in ("exact_match", "edit_similarity", "parses"):
            value, error = figures[name]["value"], figures[name]["standard_error"]
            cells.append(f"{value:.1%}" + (f" ± {error:.1%}" if error is not None else ""))
        shown.add_row(way, *cells, cell(figures["tokens_per_forward"], ".2f"), cell(figures["distinct_2"], ".1%"))
    return shown
