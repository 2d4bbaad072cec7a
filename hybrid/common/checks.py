"""How what a caller hands in is checked."""

import math
from typing import TypeGuard


def require(good: bool, message: str) -> None:
    """Raise a ValueError for the user unless `good`."""
    if not good:
        raise ValueError(message)


def is_whole(value: object, least: float = 0) -> TypeGuard[int]:
    """Whether it is a whole number of at least that: True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number: True and NaN are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
