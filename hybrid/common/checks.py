"""How what a caller hands in is checked."""

import math
from dataclasses import fields
from typing import Any, Literal, TypeGuard, get_args, get_origin


def require(good: bool, message: str) -> None:
    """Raise a ValueError for the user unless `good`."""
    if not good:
        raise ValueError(message)


def check_choices(settings: Any) -> None:
    """Raise ValueError for a field of a dataclass whose value is none of those that its type, a `Literal`, has."""
    for field in fields(settings):
        value, known = getattr(settings, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in known:
            *others, last = map(repr, known)
            raise ValueError(f"{field.name} is {value!r}; use {', '.join(others)} or {last}.")


def is_whole(value: object, least: float = 0) -> TypeGuard[int]:
    """Whether it is a whole number of at least that: True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number: True and NaN are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
