"""The report: one page that can be opened from disk, the picture beside it, and the results behind both.

The document is that of `results`, which says what is in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hybrid.common.files import write_whole
from hybrid.evals.columns import LIKELIHOOD_COLUMNS, Column, Record, filled, heading, number, seconds
from hybrid.evals.picture import curves_svg, frontier_images, frontier_svg
from hybrid.evals.results import check_results, results_csv, slug
from hybrid.evals.table import BOUND_MEANING, area, breaks_promise, marked_rows, notices, repeatability, takeaway


def write_report(document: Record, folder: Path) -> Path:
    """Writes results.json, frontier.csv, frontier.png, frontier.svg and report.html into `folder` and returns the path
    of the page.

    `folder` is made if it is missing. Each file appears whole or not at all, and nothing is written unless
    all could be made. ValueError for what `check_results` refuses, NaN and infinity included.
    """
    folder = Path(folder)
    check_results(document, "the results document")
    # Sorted keys: the same results are the same bytes, whoever built the dict and in whatever order.
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    # The page is made from what the file will say, so the two cannot differ.
    document = json.loads(text)
    # Half a surrogate pair, as a byte-level sample may end with, is no reason to lose a measurement.
    pictures = frontier_images(document, "png", "svg")
    files = {"results.json": text.encode(errors="backslashreplace"),
             "frontier.csv": results_csv(document).encode(errors="replace"),
             "frontier.png": pictures["png"], "frontier.svg": pictures["svg"],
             "report.html": render_report(document).encode(errors="replace")}
    for name, data in files.items():
        write_whole(folder / name, data)
    return folder / "report.html"


def render_report(document: Record) -> str:
    """The page as HTML: no request leaves it, and every text of the document is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["settings"] = _settings
    environment.filters["seconds"] = seconds
    return environment.get_template("report.html").render(
        document=document, acts=[_view(act) for act in document["acts"]],
        likelihood_columns=LIKELIHOOD_COLUMNS, bound_meaning=BOUND_MEANING)


def _view(act: Record) -> Record:
    """What the template shows of one act: every cell already in words, with the value it is sorted by."""
    rows = marked_rows(act)
    shown = filled(act)
    main = [column for column in shown if column.place != "ledger"]
    ledger = [column for column in shown if column.place == "ledger" or column.key in ("mode", "setting")]
    training = {key: value for key, value in (act.get("training") or {}).items() if key != "curves"}
    curves = curves_svg(act)
    return {
        "id": slug(act["name"]), "title": act["title"], "quality": act["quality"], "takeaway": takeaway(act),
        "notices": notices(act), "notes": act.get("notes") or [], "picture": Markup(frontier_svg(act)),
        "area": area(act), "repeatability": repeatability(act), "also": act.get("also") or [],
        "histograms": [_histograms(row) for row in rows], "latency": _latency(rows),
        "ceiling": act.get("ceiling") or [], "trace": act.get("trace"), "prompts": act.get("prompts") or {},
        "curves": Markup(curves) if curves else None, "model": act.get("model") or {}, "training": training,
        "columns": [{"column": column, "heading": heading(column, act)} for column in main],
        "ledger_columns": ledger,
        "rows": [{"row": row, "cells": [_cell(column, row, act) for column in main],
                  "ledger": [_cell(column, row, act) for column in ledger]} for row in rows],
        "likelihood": [[_cell(column, row, act) for column in LIKELIHOOD_COLUMNS]
                       for row in act.get("likelihood") or []],
        "samples": [{**sample, "outputs": _ordered(sample["outputs"], rows)}
                    for sample in act.get("samples") or []],
    }


def _cell(column: Column, row: Record, act: Record) -> Record:
    value = column.sorted_by(row)
    value = int(value) if isinstance(value, bool) else value
    return {"text": column.text(row, act), "value": "" if value is None else value, "numeric": column.numeric,
            "key": column.key, "warn": column.key == "agreement" and breaks_promise(row)}


def _histograms(row: Record) -> list[Record]:
    """Each of the row's histograms as bars: what was counted, how often, and its share of the most frequent."""
    found = []
    for key, title in (("tokens_per_step", "tokens a forward"), ("acceptance", "kept a round")):
        counts = {int(n): count for n, count in ((row.get("histograms") or {}).get(key) or {}).items()}
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


def _latency(rows: list[Record]) -> Record:
    """Single calls by batch size: the sizes, and for each row what was measured at each."""
    calls = [{c["batch_size"]: c for c in (row.get("timing") or {}).get("latency") or []} for row in rows]
    sizes = sorted({size for found in calls for size in found})
    return {"sizes": sizes, "rows": [[found.get(size) for size in sizes] for found in calls] if sizes else []}


def _ordered(outputs: dict[str, str], rows: list[Record]) -> list[tuple[str, str]]:
    """A sample's outputs in the order of the rows that they are named after, then whatever else there is."""
    names = [name for row in rows for name in (row["mode"], row["setting"])]
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
