"""The report: one page that can be opened from disk, the picture beside it, and the results behind both.

A results document is a plain dict that JSON can hold; `check_results` defines it, `SCHEMA` is its version.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hybrid.evals.files import write_whole
from hybrid.evals.picture import curves_svg, frontier_png, frontier_svg, slug
from hybrid.evals.table import (
    BOUND_MEANING,
    COLUMNS,
    LIKELIHOOD_COLUMNS,
    Column,
    Record,
    breaks_promise,
    heading,
    marked_rows,
    notices,
    number,
    pareto,
    takeaway,
)

SCHEMA = "hybrid-results/1"

_NUMBER, _MAYBE, _DICT, _LIST = (int, float), (int, float, type(None)), (dict, type(None)), (list, type(None))
_TYPE_NAMES = {str: "text", dict: "an object", list: "a list", bool: "true or false", _NUMBER: "a number",
               _MAYBE: "a number or null", _DICT: "an object or null", _LIST: "a list or null"}

# What a document must have, by place, and then what it may have.
_DOCUMENT: dict[str, Any] = {"created": str, "hybrid": str, "environment": dict, "acts": list}
_ACT: dict[str, Any] = {"name": str, "title": str, "quality": dict, "rows": list}
_QUALITY: dict[str, Any] = {"name": str, "unit": str, "higher_is_better": bool}
_ROW: dict[str, Any] = {"mode": str, "setting": str, "quality": _MAYBE, "tokens_per_forward": _MAYBE}
_LIKELIHOOD: dict[str, Any] = {"name": str, "bound": bool, "bits_per_byte": _MAYBE, "nats_per_token": _MAYBE}
_SAMPLE: dict[str, Any] = {"prompt": str, "outputs": dict}

_ACT_MAY: dict[str, Any] = {
    "model": _DICT, "training": _DICT, "likelihood": _LIST, "notes": _LIST, "samples": _LIST}
_ROW_MAY: dict[str, Any] = {"settings": _DICT, "forwards": _DICT} | dict.fromkeys(
    ("quality_standard_error", "exact", "distinct_2", "agreement", "tokens_per_draft", "acceptance",
     "tokens_per_second", "time_to_first_token", "prompts", "tokens_out"), _MAYBE)


def write_report(document: Record, folder: Path) -> Path:
    """Writes report.html, frontier.png and results.json into `folder` and returns the path of the page.

    `folder` is made if it is missing. Each file appears whole or not at all, and nothing is written unless
    all three could be made. ValueError for what `check_results` refuses, NaN and infinity included.
    """
    folder = Path(folder)
    check_results(document, "the results document")
    # Sorted keys: the same results are the same bytes, whoever built the dict and in whatever order.
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    # The page is made from what the file will say, so the two cannot differ.
    document = json.loads(text)
    # Half a surrogate pair, as a byte-level sample may end with, is no reason to lose a measurement.
    files = {"results.json": text.encode(errors="backslashreplace"), "frontier.png": frontier_png(document),
             "report.html": render_report(document).encode(errors="replace")}
    for name, data in files.items():
        write_whole(folder / name, data)
    return folder / "report.html"


def load_results(path: Path) -> Record:
    """Reads a results.json; ValueError names the file, the field that is wrong and what to do."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); measure again to write a new one") from error
    check_results(document, str(path))
    return document


def check_results(document: Any, where: str) -> None:
    """ValueError unless `document` is a results document of this version; the message calls it `where`."""
    if not isinstance(document, dict):
        raise ValueError(f"{where}: the results must be an object with a field 'schema'; measure them again")
    if document.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: schema is {document.get('schema')!r}, and this version of hybrid reads {SCHEMA!r}. "
            "Measure again with this version, or read the file with the version that wrote it.")
    _json_only(document, where, "")
    _require(document, _DOCUMENT, where, "")
    if not document["acts"]:
        _refuse(where, "acts", "is empty", "measure at least one task")
    names: set[str] = set()
    for i, act in enumerate(document["acts"]):
        _check_act(act, where, f"acts[{i}]")
        if slug(act["name"]) in names:
            _refuse(where, f"acts[{i}].name", f"{act['name']!r} stands twice", "give each act its own name")
        names.add(slug(act["name"]))


def _check_act(act: Any, where: str, place: str) -> None:
    _require(act, _ACT, where, place, _ACT_MAY)
    _require(act["quality"], _QUALITY, where, f"{place}.quality")
    for key, fields, optional in (("rows", _ROW, _ROW_MAY), ("samples", _SAMPLE, {}),
                                  ("likelihood", _LIKELIHOOD, {"standard_error": _MAYBE})):
        for j, entry in enumerate(act.get(key) or []):
            _require(entry, fields, where, f"{place}.{key}[{j}]", optional)
    curves = (act.get("training") or {}).get("curves") or {}
    _require(curves, dict.fromkeys(curves, list), where, f"{place}.training.curves")
    if len({len(values) for values in curves.values()}) > 1:
        _refuse(where, f"{place}.training.curves", "has lists of unequal length", "write null for gaps")
    try:
        pareto(act["rows"])
    except ValueError as error:
        raise ValueError(f"{where}: {place}.rows: {error}") from error


def render_report(document: Record) -> str:
    """The page as HTML: no request leaves it, and every text of the document is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["settings"] = _settings
    return environment.get_template("report.html").render(
        document=document, acts=[_view(act) for act in document["acts"]], columns=COLUMNS,
        likelihood_columns=LIKELIHOOD_COLUMNS, bound_meaning=BOUND_MEANING)


def _view(act: Record) -> Record:
    """What the template shows of one act: every cell already in words, with the value it is sorted by."""
    rows = marked_rows(act)
    # A column that no row of the act fills would only be a column of dashes.
    filled = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    main = [column for column in filled if column.place != "ledger"]
    ledger = [column for column in filled if column.place == "ledger" or column.key in ("mode", "setting")]
    training = {key: value for key, value in (act.get("training") or {}).items() if key != "curves"}
    curves = curves_svg(act)
    return {
        "id": slug(act["name"]), "title": act["title"], "quality": act["quality"], "takeaway": takeaway(act),
        "notices": notices(act), "notes": act.get("notes") or [], "picture": Markup(frontier_svg(act)),
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
    value = row.get(column.key)
    value = int(value) if isinstance(value, bool) else value
    return {"text": column.text(row, act), "value": "" if value is None else value, "numeric": column.numeric,
            "key": column.key, "warn": column.key == "agreement" and breaks_promise(row)}


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


def _require(record: Any, fields: Record, where: str, place: str, optional: Record | None = None) -> None:
    if not isinstance(record, dict):
        _refuse(where, place, f"is {record!r}", "it must be an object")
    for name, kind in fields.items() | {pair for pair in (optional or {}).items() if pair[0] in record}:
        spot = f"{place}.{name}".lstrip(".")
        if name not in record:
            _refuse(where, spot, "is missing", "measure again, or add it by hand")
        value = record[name]
        # bool is an int to Python, and true is no measurement.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            _refuse(where, spot, f"is {value!r}", f"it must be {_TYPE_NAMES[kind]}")


def _json_only(value: Any, where: str, place: str) -> None:
    """Refuses what JSON cannot hold: NaN and infinity, arrays, paths, keys that are not text."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                _refuse(where, place or "at the top", f"has the key {key!r}", "make it text")
            _json_only(child, where, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            _json_only(child, where, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        _refuse(where, place, f"is {value}", "JSON has no such number; write null where nothing was measured")
    elif not isinstance(value, str | int | float | None):
        _refuse(where, place, f"is a {type(value).__name__}", "convert it to a number, text, list or dict")


def _refuse(where: str, place: str, what: str, advice: str) -> NoReturn:
    raise ValueError(f"{where}: the field {place} {what}; {advice}")
