"""Questions, answers and scorers of reasoning-gym (arXiv 2505.24760), about a hundred kinds of puzzle.

What it leaves to its users, and what is done about it:

- A question depends on the sum of seed and index, so data sets of neighbouring seeds share nearly all questions.
  Training and held-out questions come from one sequence, and no question is in it twice.
- Some of its scorers (n_queens, spiral_matrix, countdown and others) run `eval` on the answer, or let sympy do so.
  An answer that a model wrote reaches those only if its syntax tree holds nothing but values and arithmetic; any other
  has score 0.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from hybrid.common.checks import require

SEEDS_APART = 10_000_019  # so many questions can be asked of a seed before it meets the next one's
TRIES = 20  # draws for each question that is new, before giving up
LONGEST = 2000  # characters of an answer that is given to a scorer that runs it
FUNCTIONS = frozenset(["acos", "asin", "atan", "cos", "cosh", "exp", "log", "sin", "sinh", "sqrt", "tan", "tanh"])
_RUNS_ANSWERS = re.compile(r"\b(?:eval|exec|parse_expr|sympify|parse_latex)\(")


@dataclass(frozen=True, kw_only=True)
class Gym:
    """One kind of question.

    Attributes:
        name: of a reasoning-gym data set, such as "mini_sudoku".
        config: its settings, such as {"max_empty": 8}.
        seed: of the questions.

    Raises ValueError, when questions are made, if reasoning-gym is not installed, or knows no such name or settings.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def questions(self, count: int, held_out: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(training, held-out) entries with "question", "answer" and "metadata"; no question is in them twice.

        The held-out ones come first in the sequence, so that they do not depend on how many are trained on. Raises
        ValueError if there are not so many different questions.
        """
        require(min(count, held_out) >= 0, f"count={count} and held_out={held_out} must not be negative.")
        found: dict[str, dict[str, Any]] = {}
        for index in range(TRIES * (count + held_out)):
            if len(found) == count + held_out:
                break
            entry = self._dataset[index]
            found.setdefault(entry["question"], entry)
        entries = list(found.values())
        if len(entries) < count + held_out:
            raise ValueError(
                f"{self.name} with {self.config or 'its own settings'} has about {len(entries)} different questions, "
                f"and count={count} and held_out={held_out} ask for more: lower them, or widen config."
            )
        return entries[held_out:], entries[:held_out]

    def score(self, answer: str, entry: dict[str, Any]) -> float:
        """The data set's own score, in [0, 1]; 0 for an answer that is not given to it (see above)."""
        if self.runs_answers and not harmless(answer):
            return 0.0
        return float(self._dataset.score_answer(answer, entry))

    @cached_property
    def runs_answers(self) -> bool:
        """Whether the scorer evaluates what it is given as Python."""
        return bool(_RUNS_ANSWERS.search(inspect.getsource(type(self._dataset).score_answer)))

    @cached_property
    def _dataset(self) -> Any:
        if find_spec("reasoning_gym") is None:
            raise ValueError("reasoning-gym is not installed: pip install 'hybrid-lm[eval]', or reasoning-gym alone.")
        import reasoning_gym

        try:
            # Entries are made when they are asked for; `size` bounds iteration alone.
            seed = self.seed * SEEDS_APART
            return reasoning_gym.create_dataset(self.name, **{**self.config, "seed": seed, "size": 2**31})
        except (AssertionError, TypeError) as error:
            raise ValueError(f"config: {self.name} does not take {self.config} ({error}).") from error
        except ValueError as error:
            from reasoning_gym.factory import DATASETS

            known = ", ".join(sorted(DATASETS))
            raise ValueError(f"name: {error}; reasoning-gym has {known}.") from error


def harmless(text: str) -> bool:
    """Whether evaluating `text`, as Python or by sympy, can do no more than arithmetic on small numbers.

    It may hold numbers, strings, names (which are not called), + - * /, small powers of names, the functions of
    `FUNCTIONS`, and lists. What is no Python may hold neither brackets nor dots nor powers nor factorials: without them
    nothing can be called, whatever a parser makes of the rest.
    """
    if len(text) > LONGEST:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return not re.search(r"[(\[{.!]|\*\s*\*|__", text)
    try:
        return _is_literal(tree)
    except RecursionError:
        return False


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.List | ast.Tuple):
        return all(map(_is_literal, node.elts))
    return (isinstance(node, ast.Constant) and isinstance(node.value, str)) or _is_arithmetic(node)


def _is_arithmetic(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            return type(value) in (int, float)
        case ast.Name(id=name):
            return "__" not in name
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _is_arithmetic(operand)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            return _is_arithmetic(left) and _is_arithmetic(right)
        case ast.BinOp(left=ast.Name() as base, op=ast.Pow(), right=ast.Constant(value=value)):
            return _is_arithmetic(base) and type(value) is int and value < 100
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return name in FUNCTIONS and _is_arithmetic(argument)
    return False
