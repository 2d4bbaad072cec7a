"""How weights are changed: AdamW, with Muon for the layers' matrices if asked, under one schedule."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hybrid.common.checks import check_choices, require


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) with a warm-up, then a decay to 0 over the job.

    Attributes:
        lr: AdamW's learning rate at the end of the warm-up.
        muon_lr: train the matrices inside the layers with Muon (arXiv 2502.16982) at this rate instead: more
            progress a step, for a little more time. 0.02 suits small models; None is AdamW for all.
        warmup_steps: steps of linear warm-up. transformers' schedules do nothing in their first step; this one begins
            with what is their second.
        decay: what follows, as in transformers' schedules of these names: "linear", "cosine", "wsd" (warm-up, stable,
            decay: as 1 - sqrt in the last `decay_share` of the job, arXiv 2405.18392) or "none". It follows the job's
            progress in steps or, when the trainer has a `max_time`, in time, whichever is further.
        decay_share: share of the job that "wsd" decays in.
        floor: the rate at the end of the decay, as a share of `lr`.
        betas: AdamW's.
        weight_decay: acts on matrices only, embeddings among them, not on norms and biases.
        clip_norm: the gradient is scaled down to this norm, unless the trainer has a gradient_clip_val.
    """

    lr: float = 1e-3
    muon_lr: float | None = None
    warmup_steps: int = 50
    decay: Literal["linear", "cosine", "wsd", "none"] = "linear"
    decay_share: float = 0.2
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def check(self, *, sharded: bool = False) -> None:
        """Raise ValueError for settings out of range, or that do not go with weights divided over processes."""
        check_choices(self)
        require(0 < self.decay_share <= 1, f"decay_share is {self.decay_share}; it is a share of the job, above 0.")
        require(0 <= self.floor <= 1, f"floor is {self.floor}; it is a share of lr.")
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; it must not be negative.")
        require(self.clip_norm > 0, f"clip_norm is {self.clip_norm}; it must be above 0.")
        require(
            self.muon_lr is None or not sharded,
            "muon_lr: Muon needs whole matrices, and this strategy divides them: leave it out, or use strategy=ddp.",
        )

    def factor(self, step: int, progress: float) -> float:
        """The share of the learning rate at a step, when `progress` (0 to 1) of the job is done."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "none" or not progress:
            return 1.0
        total = step / progress  # by the clock: how many steps the job will have at its speed so far
        begin = total - max(1.0, self.decay_share * total) if self.decay == "wsd" else 0.0
        begin = max(begin, self.warmup_steps)
        done = 1.0 if progress >= 1.0 else min(1.0, max(0.0, (step - begin) / max(1.0, total - begin)))
        shapes = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "wsd": 1 - math.sqrt(done)}
        return self.floor + (1 - self.floor) * shapes[self.decay]

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer for a model's trainable parameters."""
        inner: list[nn.Parameter] = []
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                inside = ".layers." in name and self.muon_lr is not None
                (rest if parameter.ndim < 2 else inner if inside else matrices).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        if not inner:
            return adam
        assert self.muon_lr is not None
        return Together([adam, torch.optim.Muon(inner, lr=self.muon_lr, weight_decay=self.weight_decay)])


class Together(torch.optim.Optimizer):
    """Several optimizers that step, are scheduled and are saved as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's own groups and state, so that a schedule or a checkpoint reaches them."""
        at = 0
        for part in self.parts:
            part.param_groups = self.param_groups[at : at + len(part.param_groups)]
            part.state = self.state
            at += len(part.param_groups)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
