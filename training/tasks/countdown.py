"""Countdown as text: write an expression that uses each given number once and makes a target.

A problem is "20,7,5,3:43=", the numbers in falling order and the target, and one of its answers "20*(7-5)+3", an
expression of + - * / and brackets. A problem has many answers, so an answer is judged by working it out.

Problems are made backwards, as the game's own are: two of the numbers are joined by an operation until one number is
left, which is the target. Intermediate results are whole and above 0, and nothing is multiplied or divided by 1, which
would be no step. Sets of numbers are held out whole, with every target.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from fractions import Fraction
from itertools import count as count_up

import torch

from hybrid.common.checks import require

ALPHABET = "0123456789+-*/(),:="  # for tokenizing.character_tokenizer
HELD_OUT_SHARE = 16  # one set of numbers in so many
LONGEST = 200  # characters of an answer that is looked at


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """Which problems are made.

    Attributes:
        numbers: fewest and most numbers of a problem, 2 to 6; each many equally often.
        largest: numbers are 1 to this, equally often, and may repeat.
        targets: smallest and largest target.

    Raises ValueError for ranges that are empty or out of these bounds.
    """

    numbers: tuple[int, int] = (4, 4)
    largest: int = 20
    targets: tuple[int, int] = (10, 99)

    def __post_init__(self) -> None:
        low, high = self.numbers
        require(2 <= low <= high <= 6, f"numbers={self.numbers} must be (low, high) with 2 <= low <= high <= 6")
        require(2 <= self.largest <= 999, f"largest={self.largest} must be 2 to 999")
        if not 1 <= self.targets[0] <= self.targets[1] <= 9999:
            raise ValueError(f"targets={self.targets} must be (low, high) with 1 <= low <= high <= 9999")

    @property
    def longest_answer(self) -> int:
        """Characters that an answer can have: its numbers, an operation between each two, and brackets around all
        but the last operation."""
        most = self.numbers[1]
        return most * len(str(self.largest)) + most - 1 + 2 * (most - 2)


@dataclass(frozen=True, kw_only=True)
class Term:
    """A number, or a sum or product of terms, some of them subtracted or divided by: a+b-(c-d) is the sum of a, b and
    d, less c. So expressions that differ in order and brackets alone are one term, and written alike.

    Attributes:
        value: what it comes to.
        operation: "" for a number, "+" or "*".
        parts: what is added, or multiplied.
        inverse: what is subtracted, or divided by.
    """

    value: int
    operation: str = ""
    parts: tuple[Term, ...] = ()
    inverse: tuple[Term, ...] = ()

    def split(self, operation: str) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
        """`parts` and `inverse` of it as a sum, or as a product."""
        return (self.parts, self.inverse) if self.operation == operation else ((self,), ())

    @property
    def text(self) -> str:
        """The largest values first, and no brackets but around sums in products."""
        if not self.operation:
            return str(self.value)
        forward, inverse = (
            sorted((part.value, part._within(self.operation)) for part in group) for group in (self.parts, self.inverse)
        )
        back = {"+": "-", "*": "/"}[self.operation]
        first = self.operation.join(text for _, text in reversed(forward))
        return first + "".join(back + text for _, text in reversed(inverse))

    def _within(self, operation: str) -> str:
        return f"({self.text})" if operation == "*" and self.operation == "+" else self.text


def join(left: Term, right: Term, operation: str) -> Term | None:
    """One step of the game, the larger value first; None where the result is not whole and above 0, or no step."""
    if left.value < right.value:
        left, right = right, left
    a, b = left.value, right.value
    if (operation == "-" and a == b) or (operation in "*/" and b == 1) or (operation == "/" and a % b):
        return None
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operation]
    kind = "+" if operation in "+-" else "*"
    (parts, inverse), (more, less) = left.split(kind), right.split(kind)
    if operation in "-/":
        more, less = less, more
    return Term(value=value, operation=kind, parts=parts + more, inverse=inverse + less)


def sample_problems(
    countdown: Countdown, count: int, generator: torch.Generator, *, held_out: bool, seed: int = 0
) -> list[tuple[str, str]]:
    """`count` problems, each (prompt, one answer), with sets of numbers that are held out or of those that are not.

    Drawn with replacement; `seed` decides what is held out. Raises ValueError if next to no draw gives a problem.
    """
    low, high = countdown.numbers
    found: list[tuple[str, str]] = []
    for tried in count_up(1):
        if len(found) == count:
            return found
        if tried > 100_000 and len(found) < tried / 10_000:
            raise ValueError(f"{countdown}: of {tried} draws {len(found)} give a problem; widen targets or numbers.")
        # All of a problem's randomness: its size and numbers, then two places and an operation for each step.
        draw = torch.rand(1 + 4 * high, generator=generator, dtype=torch.float64).tolist()
        many = low + int(draw[0] * (high - low + 1))
        numbers = sorted((1 + int(u * countdown.largest) for u in draw[1 : 1 + many]), reverse=True)
        if is_held_out(numbers, seed) != held_out:
            continue
        answer = _combine(numbers, draw[1 + high :])
        if answer is not None and countdown.targets[0] <= answer.value <= countdown.targets[1]:
            found.append((f"{','.join(map(str, numbers))}:{answer.value}=", answer.text))
    raise AssertionError


def _combine(numbers: list[int], draw: list[float]) -> Term | None:
    """Join two terms at random, until one is left: an operation that is not possible ends the try."""
    terms = [Term(value=n) for n in numbers]
    for step in range(len(numbers) - 1):
        u, v, w = draw[3 * step : 3 * step + 3]
        left = terms.pop(int(u * len(terms)))
        right = terms.pop(int(v * len(terms)))
        joined = join(left, right, "+-*/"[int(w * 4)])
        if joined is None:
            return None
        terms.append(joined)
    return terms[0]


def is_held_out(numbers: list[int], seed: int = 0) -> bool:
    """Whether problems with these numbers are for testing alone: the sha256 of seed and numbers says."""
    key = f"{seed}:{','.join(map(str, sorted(numbers)))}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def solved(text: str) -> bool:
    """Whether `text`, a prompt and an answer, is right: each number used once, and the target made.

    Fractions on the way are allowed, and so is a sign in front. What is not an expression is wrong, whatever it is.
    """
    problem, equals, answer = text.partition("=")
    numbers, colon, target = problem.partition(":")
    try:
        given, wanted = sorted(int(n) for n in numbers.split(",")), int(target)
    except ValueError:
        return False
    return bool(equals and colon) and makes(answer, given, wanted)


def makes(answer: str, numbers: list[int], target: int) -> bool:
    """Whether an expression uses exactly these numbers and has this value.

    Nothing is executed: the syntax tree may hold numbers, signs and the four operations, and is worked out exactly.
    """
    if len(answer) > LONGEST or not set(answer) <= set("0123456789+-*/() "):
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval").body
        used: list[int] = []
        return _value(tree, used) == target and sorted(used) == sorted(numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The value of an expression; notes the numbers in it."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, used)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, used), _value(node.right, used)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
    raise ValueError("no number, sign or one of the four operations")
