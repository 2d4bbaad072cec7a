"""The results document: its schema, reading it, and what of it does not depend on the machine.

A document is a plain dict that JSON can hold. `results.schema.json` says what is in it, field by field.
"""

import copy
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from hybrid import HybridForCausalLM, __version__
from hybrid.evals.columns import Record
from hybrid.evals.table import efficient, pareto
from hybrid.evals.timing.machine import environment

SCHEMA = "hybrid-frontier/1"

# What belongs to a machine and an hour: of the document, and of a row.
TIMES = ("created", "environment")
TIMINGS = ("tokens_per_second", "time_to_first_token", "speedup", "throughput", "timing")

_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "object": (dict,), "array": (list, tuple), "boolean": (bool,), "integer": (int,),
    "number": (int, float), "null": (type(None),),
}  # fmt: skip
_WORDS = {
    "string": "text", "object": "an object", "array": "a list", "boolean": "true or false",
    "integer": "a whole number", "number": "a number", "null": "null",
}  # fmt: skip


def load_results(path: Path) -> Record:
    """Reads a results.json, or that of a folder; ValueError names the file, the field that is wrong and what to do."""
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); measure again to write a new one") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file; name a results.json, or the folder it is in") from error
    check_results(document, str(path))
    return dict(document)


def document_of(model: HybridForCausalLM, acts: Sequence[Record], **more: Any) -> Record:
    """A results document; `more` are fields that only those know who measured."""
    return {
        "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "hybrid": __version__,
        "environment": environment(model), "acts": list(acts), **more,
    }  # fmt: skip


def measured_act(
    name: str, rows: Mapping[tuple[str, str], Record], *, metric: str, unit: str, higher_is_better: bool,
    questions: Sequence[Any], title: str | None = None,
) -> Record:  # fmt: skip
    """One metric on one set of questions, as an act that `hybrid eval compare` reads.

    Args:
        rows: by mode and setting: "value", "standard_error" and, where questions have a value each whose mean that is,
            "values".
        questions: plain values that say what was asked: results of others do not compare.
    """
    return {
        "name": f"{name}: {metric}", "title": title or f"{name}: {metric}",
        "quality": {"name": metric, "unit": unit, "higher_is_better": higher_is_better},
        "prompts": {
            "count": len(questions), "source": name,
            "sha256": hashlib.sha256(json.dumps(list(questions), sort_keys=True).encode()).hexdigest(),
        },
        "rows": [
            {"mode": mode, "setting": setting, "quality": row["value"], "tokens_per_forward": None,
             "quality_standard_error": row.get("standard_error"),
             "per_prompt": None if row.get("values") is None else {"quality": row["values"]}}
            for (mode, setting), row in rows.items()
        ],
    }  # fmt: skip


def check_results(document: Any, where: str) -> None:
    """ValueError unless `document` is a results document of this version; the message calls it `where`."""
    if not isinstance(document, dict):
        raise ValueError(f"{where}: the results must be an object with a field 'schema'; measure them again")
    if document.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: schema is {document.get('schema')!r}, and this version of hybrid reads {SCHEMA!r}. "
            "Measure again with this version, or read the file with the version that wrote it."
        )
    _json_only(document, where, "")
    _matches(document, schema(), where, "")
    names: set[str] = set()
    for i, act in enumerate(document["acts"]):
        place = f"acts[{i}]"
        if slug(act["name"]) in names:
            _refuse(where, f"{place}.name", f"{act['name']!r} stands twice", "give each act its own name")
        names.add(slug(act["name"]))
        curves = (act.get("training") or {}).get("curves") or {}
        if not isinstance(curves, dict) or not all(isinstance(values, list) for values in curves.values()):
            _refuse(where, f"{place}.training.curves", f"is {curves!r}", "it must be an object of lists")
        if len({len(values) for values in curves.values()}) > 1:
            _refuse(where, f"{place}.training.curves", "has lists of unequal length", "write null for gaps")
        for j, row in enumerate(act["rows"]):
            per = row.get("per_prompt") or {}
            if len({len(values) for values in per.values()}) > 1:
                _refuse(where, f"{place}.rows[{j}].per_prompt", "has lists of unequal length", "measure again")
        try:
            pareto(act["rows"])
        except ValueError as error:
            raise ValueError(f"{where}: {place}.rows: {error}") from error


def slug(name: str) -> str:
    """`name` as a part of an element's id."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


@cache
def schema() -> Record:
    """The JSON Schema (draft 2020-12) of the document."""
    return dict(json.loads((Path(__file__).parent / "results.schema.json").read_text(encoding="utf-8")))


def untimed(document: Record) -> Record:
    """A copy without anything that a clock or another machine changes: the rest is the same for the same model,
    prompts, settings and seed."""
    kept = {key: copy.deepcopy(value) for key, value in document.items() if key not in TIMES}
    for act in kept["acts"]:
        act["rows"] = [{k: v for k, v in row.items() if k not in TIMINGS} for row in act["rows"]]
    return kept


# Of a row, in the order of the CSV.
_CSV = (
    "mode", "setting", "quality", "quality_standard_error", "exact", "distinct_2", "repetition_4", "entropy",
    "ar_nats_per_token", "agreement", "lossless", "tokens_per_forward", "tokens_per_forward_standard_error",
    "tokens_per_draft", "acceptance", "tokens_per_second", "time_to_first_token", "speedup", "throughput",
    "prompts", "tokens_out",
)  # fmt: skip


def results_csv(document: Record) -> str:
    """The rows of all acts as CSV: a line each, `settings` and the forwards in columns of their own."""
    lines: list[Record] = []
    for act in document["acts"]:
        best = efficient(act)
        for i, row in enumerate(act["rows"]):
            line = {"act": act["name"], "quality_name": act["quality"]["name"], "efficient": i in best}
            line |= {name: row.get(name) for name in _CSV}
            line |= {f"forwards_{kind}": n for kind, n in (row.get("forwards") or {}).items()}
            timing = row.get("timing") or {}
            speeds = timing.get("tokens_per_second") or {}
            line |= {f"tokens_per_second_{end}": speeds.get(end) for end in ("low", "high")}
            line["peak_memory_bytes"] = timing.get("peak_memory_bytes")
            for call in timing.get("latency") or []:
                line[f"latency_{call['batch_size']}"] = (call["seconds"] or {}).get("median")
            line |= {f"also_{name}": got["value"] for name, got in (row.get("also") or {}).items()}
            line |= {f"settings_{name}": _flat(value) for name, value in (row.get("settings") or {}).items()}
            lines.append(line)
    columns = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _matches(value: Any, rule: Record, where: str, place: str) -> None:
    """Raises ValueError unless `value` is as the schema says. Of JSON Schema's keywords, those that the file uses."""
    if (name := rule.get("$ref")) is not None:
        rule = schema()["$defs"][name.rpartition("/")[2]]
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    # bool is an int to Python, and true is no measurement.
    known = any(isinstance(value, _KINDS[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds)
    if kinds and not known:
        words = " or ".join(_WORDS[kind] for kind in kinds)
        _refuse(where, place or "at the top", f"is {value!r}", f"it must be {words}")
    for allowed in (rule.get("enum"), [rule["const"]] if "const" in rule else None):
        if allowed is not None and value not in allowed:
            _refuse(where, place, f"is {value!r}", f"it must be {' or '.join(map(repr, allowed))}")
    if isinstance(value, dict):
        for name in rule.get("required", []):
            if name not in value:
                _refuse(where, f"{place}.{name}".lstrip("."), "is missing", "measure again, or add it by hand")
        for name, inner in rule.get("properties", {}).items():
            if name in value:
                _matches(value[name], inner, where, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        if len(value) < rule.get("minItems", 0):
            _refuse(where, place, "is empty", "measure at least one task")
        if "items" in rule:
            for i, entry in enumerate(value):
                _matches(entry, rule["items"], where, f"{place}[{i}]")


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
