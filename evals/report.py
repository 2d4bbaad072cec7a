"""The report: one page that can be opened from disk, the picture beside it, and the results behind both; and all of it
in Weights & Biases.

`document` says what is in them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hybrid.common.files import write_whole
from hybrid.evals.columns import LIKELIHOOD_COLUMNS, Column, Marked, filled, number, seconds
from hybrid.evals.document import Act, Histograms, Results, Row, Scored
from hybrid.evals.picture import curves_svg, frontier_images, frontier_svg
from hybrid.evals.results import check_results
from hybrid.evals.table import (
    BOUND_MEANING,
    area,
    breaks_promise,
    csv_rows,
    marked_rows,
    notices,
    repeatability,
    results_csv,
    speed_key,
    takeaway,
)

FILES = ("results.json", "frontier.csv", "frontier.png", "frontier.svg", "report.html")


def write_report(document: Results | dict[str, Any], folder: Path) -> Path:
    """Writes `document` as results.json, frontier.csv, frontier.png, frontier.svg and report.html into `folder` and
    returns the path of the page.

    `folder` is made if it is missing. Each file appears whole or not at all, and nothing is written unless
    all could be made. ValueError for what `check_results` refuses, NaN and infinity included.
    """
    folder = Path(folder)
    document = check_results(document, "the results document")
    # Sorted keys: the same results are the same bytes, whoever built them and in whatever order.
    text = json.dumps(document.plain(), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    # The page is made from what the file will say, so the two cannot differ.
    document = check_results(json.loads(text), "the results document")
    # Half a surrogate pair, as a byte-level sample may end with, is no reason to lose a measurement.
    pictures = frontier_images(document, "png", "svg")
    files = {"results.json": text.encode(errors="backslashreplace"),
             "frontier.csv": results_csv(document).encode(errors="replace"),
             "frontier.png": pictures["png"], "frontier.svg": pictures["svg"],
             "report.html": render_report(document).encode(errors="replace")}
    for name, data in files.items():
        write_whole(folder / name, data)
    return folder / "report.html"


def render_report(document: Results) -> str:
    """The page as HTML: no request leaves it, and every text of the document is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["settings"] = _settings
    environment.filters["seconds"] = seconds
    return environment.get_template("report.html").render(
        document=document, acts=[_view(act) for act in document.acts],
        likelihood_columns=LIKELIHOOD_COLUMNS, bound_meaning=BOUND_MEANING)


def _view(act: Act) -> dict[str, Any]:
    """What the template shows of one act: every cell already in words, with the value it is sorted by."""
    rows = marked_rows(act)
    shown = filled(act, rows)
    main = [column for column in shown if column.place != "ledger"]
    ledger = [column for column in shown if column.place == "ledger" or column.key in ("mode", "setting")]
    curves = curves_svg(act)
    return {
        "act": act, "takeaway": takeaway(act), "notices": notices(act), "picture": Markup(frontier_svg(act)),
        "area": area(act), "repeatability": repeatability(act),
        "histograms": [_histograms(row) for row in rows], "latency": _latency(rows),
        "curves": Markup(curves) if curves else None,
        "training": act.training.model_dump(exclude={"curves"}) if act.training else {},
        "columns": main, "ledger_columns": ledger,
        "rows": [{"row": row, "cells": [_cell(column, row) for column in main],
                  "ledger": [_cell(column, row) for column in ledger]} for row in rows],
        "likelihood": [[_cell(column, row) for column in LIKELIHOOD_COLUMNS] for row in act.likelihood or []],
        "samples": [(sample, _ordered(sample.outputs, rows)) for sample in act.samples or []],
    }


def _cell(column: Column, row: Marked | Scored) -> dict[str, Any]:
    value = column.sorted_by(row)
    value = int(value) if isinstance(value, bool) else value
    return {"text": column.text(row), "value": "" if value is None else value, "numeric": column.numeric,
            "key": column.key, "warn": isinstance(row, Row) and column.key == "agreement" and breaks_promise(row)}


def _histograms(row: Row) -> list[dict[str, Any]]:
    """Each of the row's histograms as bars: what was counted, how often, and its share of the most frequent."""
    found = []
    counted = row.histograms or Histograms()
    for counts_by_name, title in ((counted.tokens_per_step, "tokens a forward"), (counted.acceptance, "kept a round")):
        counts = {int(n): count for n, count in counts_by_name.items()}
        if not counts:
            continue
        most, total = max(counts.values()), sum(counts.values())
        bars = [
            {"n": n, "count": counts.get(n, 0), "height": counts.get(n, 0) / most, "share": counts.get(n, 0) / total}
            for n in range(max(counts) + 1)
        ]
        mean = sum(n * count for n, count in counts.items()) / total
        found.append({"title": title, "bars": bars, "mean": mean, "total": total})
    return found


def _latency(rows: Sequence[Row]) -> dict[str, Any]:
    """Single calls by batch size: the sizes, and for each row what was measured at each."""
    calls = [{call.batch_size: call for call in row.timing.latency} if row.timing else {} for row in rows]
    sizes = sorted({size for found in calls for size in found})
    return {"sizes": sizes, "rows": [[found.get(size) for size in sizes] for found in calls] if sizes else []}


def _ordered(outputs: dict[str, str], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """A sample's outputs in the order of the rows that they are named after, then whatever else there is."""
    names = [name for row in rows for name in (row.mode, row.setting)]
    return sorted(outputs.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names))


def _settings(value: Any) -> str:
    """A free-form value in a line: numbers readable, anything nested as JSON."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return number(value) if abs(value) >= 1 else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def log_results(
    document: Results | dict[str, Any], folder: Path, mode: Literal["offline", "online"], *, project: str = "hybrid"
) -> None:
    """One run: a table of the rows and one of the samples for each act, the picture, the page, an artifact with the
    files that `write_report` left in `folder`, and in its summary each act's AUP and its best and fastest quality.

    Raises:
        ValueError: wandb is not installed, or the run could not be written; the files in `folder` are as they were.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb is not installed: pip install wandb, or leave --wandb out.") from error
    document = check_results(document, "the results document")
    try:
        with wandb.init(
            project=project, job_type="eval", dir=str(folder), mode=mode, reinit="finish_previous",
            config={"environment": document.environment, "hybrid": document.hybrid, "schema": document.schema_},
            settings=wandb.Settings(silent=True),
        ) as run:  # fmt: skip
            logged: dict[str, Any] = {"frontier": wandb.Image(str(folder / "frontier.png"))}
            for act in document.acts:
                lines = csv_rows([act])
                data = [[_value(cell) for cell in line.values()] for line in lines]
                logged[f"{act.id}/rows"] = wandb.Table(columns=list(lines[0]) if lines else [], data=data)
                if act.samples:
                    columns = ["prompt", "target", *(f"{row.mode}: {row.setting}" for row in act.rows)]
                    data = [
                        [s.prompt, s.target, *(s.outputs.get(row.setting) for row in act.rows)] for s in act.samples
                    ]
                    logged[f"{act.id}/samples"] = wandb.Table(columns=columns, data=data)
                run.summary.update(_summary(act))
            logged["report"] = wandb.Html((folder / "report.html").read_text(encoding="utf-8"), inject=False)
            run.log(logged)
            artifact = wandb.Artifact("frontier", type="evaluation", metadata={"schema": document.schema_})
            for file in FILES:
                artifact.add_file(str(folder / file))
            run.log_artifact(artifact)
    except wandb.Error as error:
        raise ValueError(f"wandb: {error}. The results are in {folder} all the same.") from error


def _value(cell: Any) -> Any:
    # wandb's columns have one type: numbers are of one kind, and a truth value is a word.
    return str(cell) if isinstance(cell, bool) else float(cell) if isinstance(cell, int) else cell


def _summary(act: Act) -> dict[str, Any]:
    found: dict[str, Any] = {} if act.aup is None else {f"{act.id}/aup": act.aup}
    if best := [row for row in marked_rows(act) if row.efficient]:
        fastest = max(best, key=lambda row: getattr(row, speed_key(act)))
        found |= {
            f"{act.id}/fastest/setting": f"{fastest.mode}: {fastest.setting}",
            f"{act.id}/fastest/quality": fastest.quality,
            f"{act.id}/fastest/tokens_per_forward": fastest.tokens_per_forward,
            f"{act.id}/fastest/speedup": fastest.speedup,
        }
    return found
