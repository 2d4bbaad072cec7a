"""Results documents on the disk: making, reading and refusing one, and what of it does not depend on the machine.

`document` says what is in one, field by field; results.schema.json is that as a JSON Schema.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from hybrid import HybridForCausalLM, __version__
from hybrid.evals.document import (
    SCHEMA,
    TIMES,
    TIMINGS,
    Act,
    Part,
    PerPrompt,
    Plain,
    Prompts,
    Quality,
    Results,
    Row,
    schema,
    slug,
)
from hybrid.evals.table import results_csv
from hybrid.evals.timing.machine import environment

__all__ = [
    "SCHEMA", "TIMES", "TIMINGS", "check_results", "document_of", "load_results", "measured_act", "results_csv",
    "schema", "slug", "untimed",
]  # fmt: skip

P = TypeVar("P", bound=Part)

_WORDS = {
    "string": "text", "object": "an object", "array": "a list", "boolean": "true or false",
    "integer": "a whole number", "number": "a number", "null": "null",
}  # fmt: skip


def load_results(path: Path) -> Results:
    """Reads a results.json, or that of a folder.

    Raises:
        ValueError: it is missing or no results document; the file, the field that is wrong and what to do are named.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); measure again to write a new one") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file; name a results.json, or the folder it is in") from error
    return check_results(document, str(path))


def document_of(model: HybridForCausalLM, acts: Sequence[Act], /, processes: int | None = None, **more: Any) -> Results:
    """A results document of these `acts`, measured by so many `processes`; `more` are fields that only those know who
    measured."""
    about = environment(model) | ({} if processes is None else {"processes": processes})
    return check_results({
        "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "hybrid": __version__,
        "environment": about, "acts": list(acts), **more,
    }, "the results document")  # fmt: skip


def measured_act(
    name: str, rows: Mapping[tuple[str, str], Mapping[str, Any]], *, metric: str, unit: str, higher_is_better: bool,
    questions: Sequence[Any], title: str | None = None,
) -> Act:  # fmt: skip
    """One metric on one set of questions, as an act that `hybrid eval compare` reads.

    Args:
        rows: by mode and setting: "value", "standard_error" and, where questions have a value each whose mean that is,
            "values".
        questions: plain values that say what was asked: results of others do not compare.
    """
    asked = hashlib.sha256(json.dumps(list(questions), sort_keys=True).encode()).hexdigest()
    return Act(
        name=f"{name}: {metric}", title=title or f"{name}: {metric}",
        quality=Quality(name=metric, unit=unit, higher_is_better=higher_is_better),
        prompts=Prompts(count=len(questions), source=name, sha256=asked),
        rows=[
            Row(
                mode=mode, setting=setting, quality=row["value"], tokens_per_forward=None,
                quality_standard_error=row.get("standard_error"),
                per_prompt=None if row.get("values") is None else PerPrompt(quality=row["values"]),
            )
            for (mode, setting), row in rows.items()
        ],
    )  # fmt: skip


def check_results(document: Any, where: str) -> Results:
    """The results document that a plain dict is.

    Raises:
        ValueError: it is none of this version; the message begins with `where` and names the field.
    """
    if isinstance(document, Results):
        return document
    if not isinstance(document, dict):
        raise ValueError(f"{where}: the results must be an object with a field 'schema'; measure them again")
    if document.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: schema is {document.get('schema')!r}, and this version of hybrid reads {SCHEMA!r}. "
            "Measure again with this version, or read the file with the version that wrote it."
        )
    return read(Results, document, where)


def read(kind: type[P], value: Any, where: str, place: str = "") -> P:
    """A part of a document from what JSON holds; ValueError names `where` that is from, and the field, beginning with
    `place`."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{where}: the field {_refusal(error, kind, value, place)}") from error


def untimed(document: Results) -> dict[str, Any]:
    """The document without anything that a clock or another machine changes: the rest is the same for the same model,
    prompts, settings and seed."""
    times = dict.fromkeys(TIMES, True) | {"acts": {"__all__": {"rows": {"__all__": set(TIMINGS)}}}}
    return document.model_dump(exclude_unset=True, by_alias=True, exclude=times)


def _refusal(error: ValidationError, kind: type[Part], value: Any, place: str) -> str:
    """The field that is wrong, what is wrong with it and what to do."""
    wrong, *more = error.errors()
    if more and (wrong["loc"][-1], more[0]["loc"][-1]) == ("int", "float"):
        wrong = more[0]  # that a number is no whole one says least
    loc, (place, rule) = wrong["loc"], _place(wrong["loc"], kind, value, place)
    fault, value = wrong["type"], wrong["input"]
    if fault == "missing":
        return f"{place} is missing; measure again, or add it by hand"
    if fault == "value_error":
        said = str(wrong["ctx"]["error"])
        return place + ("" if said.startswith("[") else " ") + said
    if fault == "too_short":
        return f"{place} is empty; measure at least one task"
    if fault == "finite_number":
        return f"{place} is {value}; JSON has no such number; write null where nothing was measured"
    if fault == "invalid-json-value":
        return f"{place} is a {type(value).__name__}; convert it to a number, text, list or dict"
    if fault == "invalid_key" or loc[-1] == "[key]":
        return f"{place or 'at the top'} has the key {value!r}; make it text"
    kinds = rule.get("type", "object")
    words = map(repr, rule["enum"]) if "enum" in rule else (
        _WORDS[word] for word in ([kinds] if isinstance(kinds, str) else kinds))
    return f"{place} is {value!r}; it must be {' or '.join(words)}"


def _place(loc: Sequence[str | int], kind: type[Part], here: Any, place: str) -> tuple[str, dict[str, Any]]:
    """Where, as acts[0].name, and what the schema says of it."""
    whole = rule = kind.model_json_schema(schema_generator=Plain)
    for step in loc:
        rule = next((part for part in rule.get("anyOf", []) if "$ref" in part), rule)
        if "$ref" in rule:
            rule = whole["$defs"][rule["$ref"].rpartition("/")[2]]
        if isinstance(here, list) and isinstance(step, int):
            place, here, rule = f"{place}[{step}]", here[step], rule.get("items", {})
        elif isinstance(here, dict) and (step in here or (step == loc[-1] and step in rule.get("properties", {}))):
            place, here = f"{place}.{step}".lstrip("."), here.get(step)
            rule = rule.get("properties", {}).get(step) or rule.get("additionalProperties") or {}
        # Others are pydantic's words for kinds.
    return place, rule
