"""The results document: a schema that means what it says, and what is left when times are taken away."""

import copy
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from frontier_rows import NEW, SETTINGS, document, measure, model_of

from hybrid.evals.measures import measures
from hybrid.evals.results import TIMES, TIMINGS, check_results, load_results, results_csv, schema, untimed

Document = dict[str, Any]


@pytest.fixture(scope="module")
def given() -> Document:
    model = model_of()
    rows, samples = measure(model, latency_batch_sizes=(2,), also=[measures()["parses"]])
    found = document(rows, samples, model)
    (act,) = found["acts"]
    act |= {
        "aup": 3.5, "also": [measures()["parses"].record()], "notes": ["One."],
        "ceiling": [{"block_size": 4, "tokens_per_forward": 2.5, "rules": {"threshold": {"of_ceiling": 0.5}}}],
        "prompts": {"count": 6, "sha256": "0", "source": "toy", "max_new_tokens": NEW, "seed": 0},
        "likelihood": [{"name": "x", "law": "ar", "bound": False, "bits_per_byte": None, "nats_per_token": 2.0}],
    }  # fmt: skip
    return found


def rules(rule: Any) -> Iterator[Document]:
    """Every schema within the schema."""
    if isinstance(rule, dict):
        yield rule
        inner = [*rule.get("properties", {}).values(), *rule.get("$defs", {}).values()]
        for part in [*inner, *([rule["items"]] if "items" in rule else [])]:
            yield from rules(part)


def test_the_schema_has_no_keyword_that_the_check_would_ignore() -> None:
    checked = {"type", "required", "properties", "items", "minItems", "const", "enum", "$ref"}
    said = {"$schema", "title", "description", "$defs"}
    for rule in rules(schema()):
        assert set(rule) <= checked | said, rule
        assert "$ref" not in rule or rule["$ref"].removeprefix("#/$defs/") in schema()["$defs"]


def test_every_field_of_a_row_is_described(given: Document) -> None:
    about = schema()["$defs"]
    for row in given["acts"][0]["rows"]:
        assert set(row) <= set(about["row"]["properties"])
        assert set(row["timing"]) <= set(about["timing"]["properties"])
        assert set(row["per_prompt"]) <= set(about["row"]["properties"]["per_prompt"]["properties"])
        for call in row["timing"]["latency"]:
            assert set(call) <= set(about["timing"]["properties"]["latency"]["items"]["properties"])
    assert set(given["acts"][0]) <= set(about["act"]["properties"])
    assert set(given["acts"][0]["quality"]) <= set(about["quality"]["properties"])


@pytest.mark.parametrize(("place", "value", "message"), [
    ("acts.0.rows.0.histograms.acceptance", 3, "acceptance is 3; it must be an object"),
    ("acts.0.rows.0.per_prompt.forwards", [1.5] * 6, r"forwards\[0\] is 1.5; it must be a whole number"),
    ("acts.0.rows.0.per_prompt.forwards", [1], r"rows\[0\].per_prompt has lists of unequal length"),
    ("acts.0.rows.0.timing.tokens_per_second.low", None, "tokens_per_second.low is None; it must be a number"),
    ("acts.0.rows.0.timing.latency.0", {}, r"latency\[0\].batch_size is missing"),
    ("acts.0.ceiling.0.tokens_per_forward", "two", "tokens_per_forward is 'two'; it must be a number or null"),
    ("acts.0.prompts.count", 2.5, "prompts.count is 2.5; it must be a whole number"),
    ("acts.0.quality.aggregate", "median", "aggregate is 'median'; it must be 'mean' or 'perplexity'"),
    ("acts.0.notes", ["x", 3], r"notes\[1\] is 3; it must be text"),
    ("acts.0.rows.0.quality", None, "tokens_per_forward and no quality"),
    ("schema", "hybrid-frontier/2", "reads 'hybrid-frontier/1'"),
])  # fmt: skip
def test_a_wrong_field_is_named(place: str, value: Any, message: str, given: Document, tmp_path: Path) -> None:
    check_results(given, "as it is")
    broken = copy.deepcopy(given)
    *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
    here: Any = broken
    for step in way:
        here = here[step]
    here[last] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=message) as error:
        load_results(tmp_path)
    assert str(path) in str(error.value)


def test_nothing_that_a_clock_says_is_left(given: Document) -> None:
    before = copy.deepcopy(given)
    plain = untimed(given)
    assert given == before
    assert set(given) - set(plain) == set(TIMES)
    for row, kept in zip(given["acts"][0]["rows"], plain["acts"][0]["rows"], strict=True):
        assert set(row) - set(kept) == set(TIMINGS)
    again, samples = measure(model_of(), latency_batch_sizes=(2,), also=[measures()["parses"]])
    assert untimed({**given, "acts": [{**given["acts"][0], "rows": again, "samples": samples}]}) == plain
    assert again != given["acts"][0]["rows"]


def test_the_csv_has_a_line_a_row(given: Document) -> None:
    lines = list(csv.DictReader(io.StringIO(results_csv(given))))
    rows = given["acts"][0]["rows"]
    assert [line["setting"] for line in lines] == [setting.name for setting in SETTINGS]
    for line, row in zip(lines, rows, strict=True):
        assert float(line["quality"]) == row["quality"]
        assert float(line["tokens_per_forward"]) == row["tokens_per_forward"]
        assert float(line["latency_2"]) == row["timing"]["latency"][0]["seconds"]["median"]
        assert int(line["forwards_draft"]) == row["forwards"]["draft"]
        assert float(line["also_parses"]) == row["also"]["parses"]["value"]
        assert line["settings_batch_size"] == "32"
        assert line["settings_block_size"] == str(row["settings"].get("block_size", ""))
    assert {line["efficient"] for line in lines} == {"True", "False"}


def test_reading_executes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    torch.save({"schema": "hybrid-frontier/1"}, path)
    with pytest.raises(ValueError, match="not a JSON file"):
        load_results(path)
