"""Parts of a job that are not of the library, to be named by a recipe."""

import math
from typing import Any

from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.training import Batch, Component, Losses, Part


class Focal(Component):
    """An objective of one's own: next tokens, of which the hard ones count more."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def loss(
        self, model: HybridForCausalLM, batch: Batch, seed: int, progress: float = 1.0, beside: Any = None
    ) -> Losses:  # fmt: skip
        logits, wanted = model(batch["input_ids"]).logits[:, :-1], batch["input_ids"][:, 1:]
        said = logits.log_softmax(-1).gather(2, wanted[..., None])[..., 0]
        learned = batch["target"][:, 1:]
        each = -((1 - said.exp()) ** self.power) * said
        return Losses(parts={"ar": Part((each * learned).sum(), learned.sum(), 1.0)})

    def figures(self, means: dict[str, float], bits: float | None) -> dict[str, float]:
        return {**means, "perplexity": math.exp(means["ar"])}


def late(t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A schedule of one's own: p = (1 - eps) t^2 + eps."""
    p = (1 - eps) * t**2 + eps
    return p, 2 * (1 - eps) * t / p


def ones(prompt: str, answer: str, reference: str) -> float:
    """A reward of one's own."""
    return answer.count("1") / max(1, len(reference))
