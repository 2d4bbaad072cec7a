"""The journal: what is on the disk after a kill at any byte."""

import json
from pathlib import Path

import pytest
import torch
from oracles import tiny

from hybrid.evals.passes.journal import Journal, fingerprint, key_of


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "journal.jsonl"
    journal = Journal(path)
    journal.add("a", {"tokens": [[1, 2], []], "text": "é\n"})
    journal.add("b", 3)
    journal.add("a", 4)
    assert Journal(path).done == {"a": 4, "b": 3} == journal.done


def test_a_kill_at_any_byte_loses_one_record_at_most(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for key in "abc":
        Journal(path).add(key, {"n": [key]})
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        journal = Journal(path)
        whole = data[:cut].count(b"\n")
        assert list(journal.done) == list("abc")[:whole]
        journal.add("d", 1)
        assert list(Journal(path).done) == [*"abc"[:whole], "d"]


@pytest.mark.parametrize("line", ["{", "[1]", '{"record": 1}', "3", "\xff"])
def test_damage_elsewhere_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"key": "a", "record": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 2: this is no record.*--fresh"):
        Journal(path)


def test_nan_is_not_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError):
        journal.add("a", float("nan"))
    assert not journal.path.exists() or not journal.path.read_bytes()


def test_every_weight_and_the_config_count() -> None:
    model = tiny(0)
    before = fingerprint(model)
    assert fingerprint(tiny(0)) == before != fingerprint(tiny(1))
    assert fingerprint(tiny(0).to(torch.bfloat16)) != before
    for weight in model.parameters():
        kept = weight.data.clone()
        weight.data.view(-1)[-1] = torch.nextafter(kept.view(-1)[-1], torch.tensor(9.0, dtype=kept.dtype))
        assert fingerprint(model) != before
        weight.data = kept
    assert fingerprint(model) == before
    model.config.rms_norm_eps = 1e-4
    assert fingerprint(model) != before


def test_keys_depend_on_everything_and_not_on_the_order() -> None:
    assert key_of(a=1, b=[2]) == key_of(b=[2], a=1)
    assert len({key_of(a=1), key_of(a=2), key_of(b=1), key_of(a=1, b=None), key_of()}) == 5
    assert json.dumps(key_of(a=1)).isascii()
