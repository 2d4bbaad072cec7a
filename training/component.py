"""What is learned, as a component of the job: `HybridTask` and its callbacks know nothing else of it.

A loss is a mean over the tokens of a whole step. So a component gives totals and counts, and whoever knows the step
sums them over its batches and processes before it divides: neither of them changes what is learned or logged.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.training.batch import Batch
from hybrid.training.running.processes import gathered


def wide(values: Tensor) -> Tensor:
    """In float64, so that a sum does not depend on its order; in float32 where the device has nothing wider."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


@dataclass(frozen=True)
class Part:
    """A weighted mean, before it is taken.

    Attributes:
        total: sum of the weighted values, a float scalar, with gradients where it is learned.
        count: sum of the weights, a scalar of any dtype.
        weight: what the mean counts in the loss; 0 is a figure that is only looked at.
    """

    total: Tensor
    count: Tensor
    weight: float = 0.0

    def over(self, count: Tensor) -> Tensor:
        """This batch's share of the mean over `count`, a scalar in the dtype of `total`; 0 where there is nothing to be
        learned."""
        return self.total / torch.where(count > 0, count, 1).to(self.total.dtype)


def by_offset(right: Tensor, counted: Tensor, offset: Tensor, most: int) -> dict[str, Part]:
    """How many of the guesses `[N]` at each `offset`, 1 to `most`, are `right`, of those that are `counted`."""
    found = ((k, counted & (offset == k)) for k in range(1, most + 1))
    return {f"draft_accuracy_{k}": Part(wide(right & here).sum(), wide(here).sum()) for k, here in found}


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What one batch adds to its step.

    Attributes:
        parts: by name. The usual ones are "ar", mean next-token cross-entropy, and "diffusion", L_diff, in nats; "z",
            mean log(Z)^2; "masked_accuracy", share of masked slots whose most likely token is right; "kept", tokens
            that a round of speculation would keep; "draft_accuracy_k", share of first drafts k slots behind a window's
            first slot that are right.
        masked_nll: `[n]`, cross-entropy at each masked slot, with its time in `masked_t`, and in `masked_right`
            (bool) whether the most likely token is right.
        slots: of all views that went through the layers.
        logits: rows of logits that were computed.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)
    masked_nll: Tensor | None = None
    masked_t: Tensor | None = None
    masked_right: Tensor | None = None
    slots: int = 0
    logits: int = 0

    @property
    def counts(self) -> dict[str, Tensor]:
        """Of the parts that are learned, by their names: scalars."""
        return {name: part.count for name, part in self.parts.items() if part.weight}

    def share(self, counts: Mapping[str, Tensor]) -> Tensor:
        """This batch's share of the loss of a step that has these `counts` in all, a float scalar: the shares add up to
        the loss."""
        shares = [part.weight * part.over(counts[name]) for name, part in self.parts.items() if part.weight]
        return torch.stack(shares).sum() if len(shares) > 1 else shares[0]

    @property
    def total(self) -> Tensor:
        """The loss of this batch alone, a float scalar in nats."""
        return self.share(self.counts)

    def mean(self, name: str) -> Tensor | None:
        """A part's mean over this batch alone, a float scalar; None where there is no such part, or a figure has
        nothing to be of."""
        part = self.parts.get(name)
        if part is None or (part.weight == 0 and not part.count):
            return None
        return part.over(part.count)

    @property
    def ar(self) -> Tensor | None:
        """Mean next-token cross-entropy in nats, a float scalar; None where it is not learned."""
        return self.mean("ar")

    @property
    def diffusion(self) -> Tensor | None:
        """L_diff in nats, a float scalar; None where it is not learned."""
        return self.mean("diffusion")

    @property
    def z(self) -> Tensor | None:
        """Mean log(Z)^2, a float scalar; None where it is not learned."""
        return self.mean("z")

    @property
    def masked_accuracy(self) -> Tensor | None:
        """Share of masked slots whose likeliest token is right, a float scalar; None where none is masked."""
        return self.mean("masked_accuracy")

    @property
    def kept(self) -> Tensor | None:
        """Tokens that a round of speculation would keep, a float scalar; None where no drafter is trained."""
        return self.mean("kept")

    def detached(self) -> "Losses":
        """The same figures, without what gradients need."""
        return replace(self, parts={k: replace(part, total=part.total.detach()) for k, part in self.parts.items()})


class Means:
    """The parts of several batches, of a step or of a whole evaluation, summed before they are divided."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._weights: dict[str, float] = {}

    def add(self, found: Losses) -> None:
        """Count one more batch in."""
        if not found.parts:
            return
        dtype = next(iter(found.parts.values())).total.dtype
        values = [x.detach().to(dtype) for part in found.parts.values() for x in (part.total, part.count)]
        for (name, part), both in zip(found.parts.items(), torch.stack(values).view(-1, 2).tolist(), strict=True):
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = [before[0] + both[0], before[1] + both[1]]
            self._weights[name] = part.weight

    def taken(self) -> dict[str, float]:
        """The means over all processes, and the loss that they make, "loss"; a part that is of nothing is left out.
        All processes must call this together."""
        found: dict[str, float] = {}
        loss, weights = 0.0, dict(self._weights)
        everywhere = gathered((self._sums, self._weights))
        for _, theirs in everywhere:
            weights |= theirs
        for name, weight in weights.items():
            total, count = (sum(sums[name][i] for sums, _ in everywhere if name in sums) for i in (0, 1))
            if count:
                found[name] = total / count
                loss += weight * found[name]
        return {"loss": loss, **found}


class Component(ABC):
    """What is learned. `Objective`, `Drafter` and `GRPO` are some; one's own is a class beside one's job.

    Attributes:
        keeps_model: what `attach` gives is trained, and the model stays as it is; else the model is trained, and what
            `attach` gives is only looked at, and saved with the job.
        whole_model: why strategies that divide the model over processes are refused; "" where they are not.
    """

    keeps_model: ClassVar[bool] = False
    whole_model: ClassVar[str] = ""

    def check(self, config: HybridConfig, length: int) -> None:  # noqa: B027 (nothing to check is fine)
        """Raise ValueError for settings that do not go with the model or with sequences of `length` tokens."""

    def attach(self, model: HybridForCausalLM, seed: int) -> nn.Module | None:
        """What stands beside `model`, its weights drawn from `seed`: all that is trained, or only looked at (see
        `keeps_model`). None where nothing does."""
        return None

    def prepare(self, tokenizer: Any, beside: Any) -> None:  # noqa: B027
        """Told before each run what the text is made of (`tokenizer`; None: nobody knows); `beside` is what `attach`
        gave."""

    def begin_step(self, model: HybridForCausalLM, step: int, beside: Any) -> None:  # noqa: B027
        """Told before the first batch of step `step`, of a job that goes on as of one that begins; `beside` is what
        `attach` gave."""

    @abstractmethod
    def loss(
        self, model: HybridForCausalLM, batch: Batch, seed: int, progress: float = 1.0, beside: Any = None
    ) -> Losses:  # fmt: skip
        """What a batch adds to its step.

        Args:
            seed: of all noise, together with the batch's `index`.
            progress: how much of the job is done, 0 to 1.
            beside: what `attach` gave.
        """

    def counts(
        self, model: HybridForCausalLM, batch: Batch, seed: int, progress: float = 1.0, beside: Any = None
    ) -> dict[str, Tensor]:  # fmt: skip
        """The counts of what is learned, before its turn comes: where gradients are accumulated, all batches of a step
        are asked at its start. To be overridden where they can be had without the whole loss.

        Args:
            batch, seed, progress, beside: as of `loss`.

        Returns:
            The `Losses.counts` of the batch.
        """
        with torch.no_grad():
            return self.loss(model, batch, seed, progress, beside).counts

    def figures(self, means: dict[str, float], bits: float | None) -> dict[str, float]:
        """What is logged of a step's means; `bits` a byte are one nat a token, where that is known."""
        return means

    def artifact(self, model: HybridForCausalLM, beside: Any) -> Any:
        """What the job leaves in its folder, by its `save_pretrained`: the model, or what is `beside` it."""
        return model
