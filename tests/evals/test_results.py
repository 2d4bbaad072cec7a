"""The results document: a schema that means what it says, and what is left when times are taken away."""

import copy
import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from frontier_rows import NEW, SETTINGS, document, measure, model_of

import hybrid.evals.document
from hybrid.evals.document import Part
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
        "aup": 3.5, "also": [measures()["parses"].record().plain()], "notes": ["One."],
        "ceiling": [{"block_size": 4, "tokens_per_forward": 2.5, "rules": {"threshold": {"of_ceiling": 0.5}}}],
        "prompts": {"count": 6, "sha256": "0", "source": "toy", "max_new_tokens": NEW, "seed": 0},
        "likelihood": [{"name": "x", "law": "ar", "bound": False, "bits_per_byte": None, "nats_per_token": 2.0}],
    }  # fmt: skip
    return found


def test_parts_read_as_dictionaries_for_one_version_more(given: Document, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(given))
    found = load_results(tmp_path)
    with pytest.warns(DeprecationWarning, match="acts"):
        (act,) = found["acts"]
    with pytest.warns(DeprecationWarning, match="rows"):
        row = act["rows"][0]
    with pytest.warns(DeprecationWarning):
        assert row["quality"] == row.quality and row.get("no such", 3) == 3
    with pytest.warns(DeprecationWarning), pytest.raises(KeyError):
        row["no such"]


def parts(part: Any) -> Iterator[Part]:
    """It and all within it."""
    if isinstance(part, Part):
        yield part
    inner = dict(part).values() if isinstance(part, Part | dict) else part if isinstance(part, list) else []
    for one in inner:
        yield from parts(one)


def test_the_schema_beside_the_code_is_that_of_the_classes() -> None:
    """Where they differ: `python -m hybrid.evals.document > evals/results.schema.json`."""
    path = Path(hybrid.evals.document.__file__).with_name("results.schema.json")
    assert json.loads(path.read_text(encoding="utf-8")) == schema()


def test_every_field_that_is_written_is_described(given: Document) -> None:
    found = list(parts(check_results(given, "as it is")))
    assert {type(part).__name__ for part in found} == {
        "Act", "Call", "Figure", "Histograms", "Limit", "PerPrompt", "Prompts", "Quality", "Reached", "Results", "Row",
        "Sample", "Scored", "Spread", "Timing",
    }  # fmt: skip
    assert not [part for part in found if part.model_extra]


def test_what_is_read_is_what_is_written(given: Document) -> None:
    """Whole numbers stay whole, null stays null, and what is not there does not come; unknown fields are kept."""
    text = json.dumps(given | {"more": {"deep": [1, 1.0, None]}})
    found = check_results(json.loads(text), "as it is")
    assert json.dumps(found.plain(), sort_keys=True) == json.dumps(json.loads(text), sort_keys=True)


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
    plain = untimed(check_results(given, "as it is"))
    assert given == before
    assert set(given) - set(plain) == set(TIMES)
    for row, kept in zip(given["acts"][0]["rows"], plain["acts"][0]["rows"], strict=True):
        assert set(row) - set(kept) == set(TIMINGS)
    again, samples = measure(model_of(), latency_batch_sizes=(2,), also=[measures()["parses"]])
    other = {**given, "acts": [{**given["acts"][0], "rows": again, "samples": samples}]}
    assert untimed(check_results(other, "again")) == plain
    assert again != given["acts"][0]["rows"]


def test_the_csv_has_a_line_a_row(given: Document) -> None:
    lines = list(csv.DictReader(io.StringIO(results_csv(check_results(given, "as it is")))))
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


def test_the_package_offers_what_it_names_and_imports_it_late() -> None:
    assert all(getattr(hybrid.evals, name) is not None for name in hybrid.evals.__all__)
    assert callable(hybrid.evals.act_of) and callable(hybrid.evals.score)
    code = "import sys, hybrid.evals\nassert not {'matplotlib', 'wandb', 'transformers'} & set(sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
