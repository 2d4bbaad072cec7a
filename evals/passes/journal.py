"""What a sweep has finished so far, so that a killed one goes on where it stopped.

A JSON Lines file. A line is one pass of one setting over the prompts: its key, a hash of everything that it depends
on, and its record. A line is appended with one write and synced, so a kill leaves at most a torn last line, which
is dropped.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.common.files import append, whole_lines


def fingerprint(model: HybridForCausalLM) -> str:
    """A hash of the config and of every weight, to the bit."""
    found = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def key_of(**depends_on: Any) -> str:
    """The hash of everything that a record depends on."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Journal:
    """Records by their keys, on the disk as soon as `add` returns."""

    def __init__(self, path: Path) -> None:
        """Reads what is there, and cuts a torn last line off.

        Raises:
            ValueError: the file is damaged elsewhere.
        """
        self.path = Path(path)
        self.done: dict[str, Any] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for number, line in enumerate(whole_lines(self.path, cut=True), 1):
            try:
                entry = json.loads(line)
                self.done[entry["key"]] = entry["record"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: this is no record of a sweep ({error}); delete the file, or start "
                    "with --fresh, to measure everything anew."
                ) from error

    def add(self, key: str, record: Any) -> None:
        """Keep one finished record."""
        append(self.path, json.dumps({"key": key, "record": record}, allow_nan=False).encode())
        self.done[key] = record
