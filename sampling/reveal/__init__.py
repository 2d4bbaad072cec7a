"""Reveal rules: which hidden slots of a window are shown after a draft, and with what.

A rule is a pure function `Reveal(canvas, logits [B, K, V]) -> tokens [B, K], hidden bool [B, K]`. Each row that
has a hidden slot must show at least one a step; what an earlier draft showed stays, unless the rule hides it again.
A file of this folder holds one rule: a factory of the file's name whose keyword arguments are options of `generate`
(`random_.py` is no `random.py`, which a Python started here would take for its own module).
A user's own function serves as well. Attributes of a rule say more about it where they are true: with `in_order` it
finds random numbers in `canvas.order` which stay the same while a window is drafted; with `remasks` it may hide again
what it has shown, so that a text does not end before its window is full; with `can_wait` it knows what it is sure of,
and in rows of which `canvas.must` is false shows that and no more, be it nothing.
"""

import functools
import importlib
import inspect
import pkgutil
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.common.checks import is_number, is_whole
from hybrid.sampling.choosing.choice import Draws


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A window while it is drafted.

    Attributes:
        tokens: int64 `[B, K]`; the mask token where nothing is shown yet.
        hidden: bool `[B, K]`, the slots that may be shown now.
        drafted: bool `[B, K]`, slots that an earlier draft showed: the only ones that may be hidden again.
        confidence: float32 `[B, K]`, what the model gave each shown draft when it was shown; 1 for given text.
        guess: int64 `[B, K]`, a token for every slot, chosen greedily or sampled as the caller asked.
        certainty: float32 `[B, K]`, the model's probability of each guess, before any warping.
        step: int64 `[B]`, drafts of this window so far.
        steps: how many drafts a window is meant to take.
        width: int64 `[B]`, the slots of the block that is being filled, known ones included.
        must: bool `[B]`, rows that have to show at least one: all, but where several blocks are in flight.
        order: float64 `[B, K]` in [0, 1), drawn once a window for rules that ask for it with `in_order`.
        draws: one generator per row, for rules that choose slots at random.
        mask_token_id: what stands in hidden slots.
    """

    tokens: Tensor
    hidden: Tensor
    drafted: Tensor
    confidence: Tensor
    guess: Tensor
    certainty: Tensor
    step: Tensor
    steps: int
    width: Tensor
    must: Tensor
    order: Tensor
    draws: Draws
    mask_token_id: int

    def rank(self, score: Tensor) -> Tensor:
        """int64 `[B, K]`: each hidden slot's rank in its row by `score`, float `[B, K]`, the highest first; shown slots
        come last."""
        order = score.masked_fill(~self.hidden, float("-inf")).argsort(dim=1, descending=True, stable=True)
        return order.argsort(dim=1)

    def best(self, rank: Tensor) -> Tensor:
        """bool `[B, K]`: the slot of rank 0 in each row that must show one."""
        return (rank == 0) & self.must[:, None]

    def due(self) -> Tensor:
        """int64 `[B, 1]`: how many to show now, so that `steps` drafts show all: evenly, the remainder first."""
        left = (self.steps - self.step).clamp(min=1)[:, None]
        return (self.hidden.sum(1, keepdim=True) + left - 1) // left

    def show(self, shown: Tensor, hide: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rule's result when it shows the guesses at `shown` and hides again what is at `hide` (bool `[B, K]`)."""
        shown = shown & self.hidden
        tokens, hidden = self.guess.where(shown, self.tokens), self.hidden & ~shown
        if hide is None:
            return tokens, hidden
        hide = hide & self.drafted
        return tokens.masked_fill(hide, self.mask_token_id), hidden | hide


Reveal = Callable[[Canvas, Tensor], tuple[Tensor, Tensor]]
"""A canvas and logits `[B, K, V]` to tokens int64 `[B, K]` and what is hidden still, bool `[B, K]`."""


@functools.cache
def rules() -> Mapping[str, Callable[..., Reveal]]:
    """Every rule by name: of each file of this folder the function of its name, where it has one."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        name = module.name.removesuffix("_")  # which keeps a file from having the name of a library's module
        factory = getattr(importlib.import_module(f"{__name__}.{module.name}"), name, None)
        if callable(factory):
            found[name] = factory
    return types.MappingProxyType(found)


@functools.cache
def options(name: str) -> tuple[str, ...]:
    """The options of `generate` that belong to a rule."""
    return tuple(inspect.signature(rules()[name]).parameters)


@functools.cache
def owners() -> Mapping[str, tuple[str, ...]]:
    """The rules that have each option."""
    every = dict.fromkeys(option for name in rules() for option in options(name))
    return {option: tuple(name for name in rules() if option in options(name)) for option in every}


def rule(name: str, **given: Any) -> Reveal:
    """A rule with these options: the same one for the same options, so that rows can be shown to it together.

    Raises:
        ValueError: an option out of range.
    """
    try:
        return _kept(name, **given)
    except TypeError:  # an option that cannot be hashed is none of ours: the rule says so
        return rules()[name](**given)


@functools.lru_cache(64, typed=True)
def _kept(name: str, **given: Any) -> Reveal:
    return rules()[name](**given)


def entropies(logits: Tensor) -> Tensor:
    """Entropy in nats of each slot's distribution, `[B, K]`."""
    law = logits.float().log_softmax(-1)
    return -torch.where(law.isfinite(), law.exp() * law, 0.0).sum(-1)


def margins(logits: Tensor) -> Tensor:
    """How far each slot's likeliest token is ahead of the second, `[B, K]`."""
    first, second = logits.float().softmax(-1).topk(2, -1).values.unbind(-1)
    return first - second


def checked_threshold(confidence_threshold: float) -> None:
    """Raises a ValueError unless it is a probability above 0."""
    if not is_number(confidence_threshold) or not 0 < confidence_threshold <= 1:
        raise ValueError(f"confidence_threshold is {confidence_threshold!r}; it must be a number in (0, 1].")


def checked_steps(steps_per_block: int | None) -> None:
    """Raises a ValueError unless it is None or a number of steps."""
    if steps_per_block is not None and not is_whole(steps_per_block, 1):
        raise ValueError(f"steps_per_block is {steps_per_block!r}; it must be a whole number, at least 1.")


def checked(rule: Reveal, canvas: Canvas, result: tuple[Tensor, Tensor], vocabulary: int) -> None:
    """Raises a ValueError unless a rule of the caller's showed something in every row, or decoding would never end,
    nothing but tokens, the mask token not being one, and hid again what it may."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ValueError(f"reveal: the rule returned a {type(result).__name__}; it must be tokens and hidden, a pair.")
    tokens, left = result  # hidden still
    for name, given, like in (("tokens", tokens, canvas.tokens), ("hidden", left, canvas.hidden)):
        if not isinstance(given, Tensor) or given.shape != like.shape or given.dtype != like.dtype:
            raise ValueError(f"reveal: the rule's {name} must be {like.dtype} {list(like.shape)}, as canvas.{name} is.")
    fresh = canvas.hidden & ~left
    if (canvas.must & canvas.hidden.any(1) & ~fresh.any(1)).any():
        raise ValueError("reveal: the rule showed nothing in a row; a row with hidden slots must show at least one.")
    if (fresh & ((tokens == canvas.mask_token_id) | (tokens < 0) | (tokens >= vocabulary))).any():
        raise ValueError("reveal: the rule showed a mask token, or what is no token; show such as canvas.guess has.")
    if (left & canvas.drafted).any() and not getattr(rule, "remasks", False):
        raise ValueError("reveal: the rule hid again what it had shown; say so with an attribute: rule.remasks = True.")
