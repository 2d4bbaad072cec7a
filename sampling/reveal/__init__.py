"""Reveal rules: which hidden slots of a window are shown after a draft, and with what.

A rule is a pure function `Reveal(canvas, logits [B, K, V]) -> tokens [B, K], hidden bool [B, K]`. Each row that
has a hidden slot must show at least one a step. A file of this folder holds one rule: a factory of the file's
name whose keyword arguments are options of `generate`. A user's own function serves as well.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hybrid.sampling.choice import Draws


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A window while it is drafted.

    Attributes:
        tokens: int64 `[B, K]`; the mask token where nothing is shown yet.
        hidden: bool `[B, K]`, the slots that may be shown now.
        confidence: float32 `[B, K]`, what the model gave each shown draft when it was shown; 1 for given text.
        guess: int64 `[B, K]`, a token for every slot, chosen greedily or sampled as the caller asked.
        certainty: float32 `[B, K]`, the model's probability of each guess, before any warping.
        step: int64 `[B]`, drafts of this window so far.
        steps: how many drafts a window is meant to take.
        draws: one generator per row, for rules that choose slots at random.
    """

    tokens: Tensor
    hidden: Tensor
    confidence: Tensor
    guess: Tensor
    certainty: Tensor
    step: Tensor
    steps: int
    draws: Draws

    def rank(self, score: Tensor) -> Tensor:
        """Each hidden slot's rank in its row by `score` `[B, K]`, the highest first; shown slots come last."""
        order = score.masked_fill(~self.hidden, float("-inf")).argsort(dim=1, descending=True, stable=True)
        return order.argsort(dim=1)

    def show(self, shown: Tensor) -> tuple[Tensor, Tensor]:
        """The rule's result when it shows the guesses at `shown` (bool `[B, K]`)."""
        shown = shown & self.hidden
        return self.guess.where(shown, self.tokens), self.hidden & ~shown


Reveal = Callable[[Canvas, Tensor], tuple[Tensor, Tensor]]


def rules() -> dict[str, Callable[..., Reveal]]:
    """Every rule by name: the factories of this folder's files."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        found[module.name] = getattr(importlib.import_module(f"{__name__}.{module.name}"), module.name)
    return found


def options(name: str) -> tuple[str, ...]:
    """The options of `generate` that belong to a rule."""
    return tuple(inspect.signature(rules()[name]).parameters)


def everything(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Show all at once: the one draft of a speculative round."""
    return canvas.show(canvas.hidden)
