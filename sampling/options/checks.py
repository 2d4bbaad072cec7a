"""The options of one call, and how it is refused."""

from dataclasses import dataclass
from typing import Any

from hybrid.common.checks import is_number, is_whole, require

DRAWS = ("temperature", "top_k", "top_p", "min_p")  # options that say how tokens are drawn


class LogitsError(ValueError):
    """No token follows from a model's logits: they are not numbers, or every token is forbidden.

    Attributes:
        row: of the batch, or the number of the request.
        step: the row's forward, prefill included, from 1.
        reason: in words.
    """

    def __init__(self, row: int, step: int, reason: str) -> None:
        super().__init__(f"row {row}, step {step}: {reason}")
        self.row, self.step = row, step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.row, self.step, str(self).split(": ", 1)[1])


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

    def number(self, name: str) -> Any:
        """An option that is a number, or None.

        Raises:
            ValueError: it is something else.
        """
        value = self.get(name)
        require(value is None or is_number(value), f"{name} is {value!r}; it must be a finite number.")
        return value

    def whole(self, name: str, default: Any = None, least: int = 1) -> Any:
        """An option that is a whole number, or None.

        Raises:
            ValueError: it is something else, or less than `least`.
        """
        value = self.get(name, default)
        above = " above 0" if least else ""
        require(value is None or is_whole(value, least), f"{name} is {value!r}; it must be a whole number{above}.")
        return value
