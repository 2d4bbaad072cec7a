"""How weights are changed: AdamW, with Muon for the layers' matrices if asked, under one schedule."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) with a warm-up, then a decay to 0 over the job.

    Attributes:
        lr: AdamW's learning rate at the end of the warm-up.
        muon_lr: train the matrices inside the layers with Muon (arXiv 2502.16982) at this rate instead: more
            progress a step, for a little more time. 0.02 suits small models; None is AdamW for all.
        warmup_steps: steps of linear warm-up.
        decay: shape of the decay: "linear", "cosine" or "none". It follows the job's progress in steps or, when
            the trainer has a `max_time`, in time, whichever is further.
        betas: AdamW's.
        weight_decay: acts on matrices only, not on norms and biases.
        clip_norm: the gradient is scaled down to this norm.
    """

    lr: float = 1e-3
    muon_lr: float | None = None
    warmup_steps: int = 50
    decay: Literal["linear", "cosine", "none"] = "linear"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def factor(self, step: int, progress: float) -> float:
        """The share of the learning rate at a step, when `progress` (0 to 1) of the job is done."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = max(0.0, 1.0 - progress)
        return warm * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "none": 1.0}[self.decay]

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
