"""The options of one call, and how it is refused."""

from dataclasses import dataclass
from typing import Any


def require(good: bool, message: str) -> None:
    """Raise a ValueError for the user unless `good`."""
    if not good:
        raise ValueError(message)


@dataclass(frozen=True)
class Options:
    """The options in force.

    Attributes:
        ours: those that this loop has.
        theirs: those that only transformers' own loops have.
        explicit: names given with the call: they must all make sense, where stored defaults may not apply.
    """

    ours: dict[str, Any]
    theirs: dict[str, Any]
    explicit: frozenset[str]

    def get(self, name: str, default: Any = None) -> Any:
        return self.ours.get(name, default)
