"""A job's settings as plain values, for loggers and checkpoints, and back.

What is read back may come from anywhere, so that only classes of this library are made again: a file cannot name code
to be run.
"""

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from hybrid.common.renamed import MOVED
from hybrid.noise import SCHEDULES
from hybrid.training.tasks.rewards import REWARDS

# Settings that may be functions: a file may name those of this library.
FUNCTIONS: dict[str, Mapping[str, Any]] = {"schedule": SCHEDULES, "reward": REWARDS}


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries; an object is its class by name, and what it was made of."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made_of = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class_path": _name(type(value)), "init_args": made_of}
    return _name(value) if hasattr(value, "__qualname__") else {"class_path": _name(type(value))}


def revived(value: Any) -> Any:
    """What `plain` was given.

    Raises:
        ValueError: it was an object of somebody else's class.
    """
    if isinstance(value, list):
        return [revived(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {name: revived(inner) for name, inner in value.items()}
    place, _, name = str(value["class_path"]).rpartition(".")
    # Checkpoints outlast the names of modules.
    kind = getattr(import_module(MOVED.get(place, place)), name, None) if place.startswith("hybrid.") else None
    made_of = {name: revived(inner) for name, inner in value.get("init_args", {}).items()}
    foreign = [made_of[name] for name, known in FUNCTIONS.items() if name in made_of and made_of[name] not in known]
    if foreign or not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(
            f"{foreign[0] if foreign else value['class_path']} is not of this library, and a file may not "
            "say what is to be run: make it yourself, and pass it by its name."
        )
    return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in made_of.items()})


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
