"""Reads what wandb wrote offline, without wandb's own reader: LevelDB's log format around protobuf records.

The file begins with `:W&B`, a magic number and a version (7 bytes). Blocks of 32 KiB follow, the first shortened by
that; in them pieces of records, each behind a checksum (4 bytes), a length (2) and a kind (1 whole, 2 first, 3 middle,
4 last).
"""

import json
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def records(file: Path) -> list[Any]:
    """Every record of a finished run, in order. wandb's own process writes them, when it comes to it."""
    patience = time.monotonic() + 60
    while True:
        found = _written(file.read_bytes())
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < patience, "the run was never closed"
        time.sleep(0.1)


def _written(data: bytes) -> list[Any]:
    at, found, pending = HEADER, [], b""
    assert data[:4] in (b":W&B", b"")
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little is left of the block for a piece
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pending += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            found.append(record)
            pending = b""
    return found


def items(entries: Any) -> dict[str, Any]:
    """Key and value of each entry; entries with a path of keys become dicts in dicts."""
    found: dict[str, Any] = {}
    for entry in entries:
        *path, last = entry.nested_key or [entry.key]
        place = found
        for key in path:
            place = place.setdefault(key, {})
        place[last] = json.loads(entry.value_json)
    return found


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, a dict for each call."""
    return [items(r.history.item) for r in records(file) if r.WhichOneof("record_type") == "history"]


def whole_history(files: list[Path]) -> list[dict[str, Any]]:
    """What was logged in the parts of a run: a part that was begun by rewinding says where, and what was there behind
    that place is forgotten."""
    found: list[dict[str, Any]] = []
    for file in files:
        (run,) = [r.run for r in records(file) if r.WhichOneof("record_type") == "run"][:1]
        if run.HasField("branch_point"):
            assert run.branch_point.run == run.run_id and run.branch_point.metric == "_step"
            found = [call for call in found if call["_step"] <= run.branch_point.value]
        part = history(file)
        steps = [call["_step"] for call in (*found, *part)]
        assert steps == sorted(set(steps)), "rows are numbered on"
        found += part
    return found


def settings(file: Path) -> dict[str, Any]:
    """The config as it was last."""
    found: dict[str, Any] = {}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            found |= items((record.run.config if kind == "run" else record.config).update)
    return found


def artifacts(file: Path) -> list[Any]:
    """The artifacts that were logged: name, type and manifest."""
    return [r.request.log_artifact.artifact for r in records(file) if r.request.HasField("log_artifact")] + [
        r.artifact for r in records(file) if r.WhichOneof("record_type") == "artifact"
    ]
