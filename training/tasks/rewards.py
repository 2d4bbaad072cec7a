"""What a text that the model wrote is worth: a function of (prompt, answer, reference), the texts of a row's prompt, of
what the model wrote behind it and of what the row has there itself; "" where it has nothing.

An answer is data from a model: a reward looks at it, and must not run it.
"""

from collections.abc import Callable

from hybrid.common.lazy import function_of
from hybrid.training.tasks.countdown import solved

Reward = Callable[[str, str, str], float]


def reference(prompt: str, answer: str, reference: str) -> float:
    """1 for what the row itself has, to the letter: for puzzles with one right answer, as sudoku."""
    return float(answer == reference)


def countdown(prompt: str, answer: str, reference: str) -> float:
    """1 for any expression that uses each number once and makes the target."""
    return float(solved(prompt + answer))


REWARDS: dict[str, Reward] = {"reference": reference, "countdown": countdown}


def reward_of(name: str | Reward) -> Reward:
    """A reward by its name, here or, as "package.module.name", in a module of one's own.

    Raises:
        ValueError: there is none of that name.
    """
    return function_of("reward", name, REWARDS)
