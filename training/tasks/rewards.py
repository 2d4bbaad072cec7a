"""What a text that the model wrote is worth: a function of (prompt, answer, reference), the texts of a row's prompt, of
what the model wrote behind it and of what the row has there itself; "" where it has nothing.

An answer is data from a model: a reward looks at it, and must not run it.
"""

from collections.abc import Callable
from importlib import import_module

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
    if not isinstance(name, str):
        return name
    if name in REWARDS:
        return REWARDS[name]
    place, _, last = name.rpartition(".")
    try:
        found = getattr(import_module(place), last)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(_no_reward(name)) from error
    if not callable(found):
        raise ValueError(_no_reward(name))
    made: Reward = found
    return made


def _no_reward(name: str) -> str:
    return f"reward is {name!r}; use one of {list(REWARDS)}, or package.module.name of a function of your own."
