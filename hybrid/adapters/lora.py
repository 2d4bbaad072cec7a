"""Low-rank fine-tuning (LoRA, arXiv 2106.09685): of y = W x + alpha / rank * B A x, only A and B are learned.

Unlike those of a `DraftAdapter`, the deltas act on all streams, so that they change the model itself. What a job saves
is an ordinary model, in which W + alpha / rank * B A stands for W, and beside it the deltas alone in peft's format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.adapters.low_rank import Delta, chosen_maps, fresh, moved, write_peft
from hybrid.common.checks import require
from hybrid.model import HybridForCausalLM

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRankLinear(nn.Module):
    """A frozen linear map and its delta, with the names that the map had, and `lora_A`, `lora_B` beside them."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, scale
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = fresh(base, rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        return moved(F.linear(x, self.weight, self.bias), x, Delta(self.lora_A, self.lora_B, self.scale))


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which maps get deltas, and how large.

    Attributes:
        rank: of the deltas.
        alpha: their scale x rank.
        targets: names of the maps inside the layers, as in peft's `target_modules`.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ATTENTION_AND_MLP

    def insert(self, model: HybridForCausalLM, seed: int) -> None:
        """Freeze `model` and give it deltas, which are nothing yet; half of each is drawn from `seed`.

        Raises:
            ValueError: no target, one that the model does not have, or a rank below 1.
        """
        require(bool(self.targets), "lora.targets is empty: name the maps that get deltas, or leave lora out.")
        maps, generator = chosen_maps(model, self.rank, self.targets, "lora."), torch.Generator().manual_seed(seed)
        model.requires_grad_(False)
        for name, base in maps.items():
            model.set_submodule(name, LowRankLinear(base, self.rank, self.alpha / self.rank, generator))

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the model that says the same without deltas."""
        found = {name: weight for name, weight in state.items() if not name.endswith((".lora_A", ".lora_B"))}
        for name, (down, up) in _deltas(state).items():
            weight = found[f"{name}.weight"]
            delta = up.float() @ down.float() * (self.alpha / self.rank)
            found[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
        return found

    def save(self, state: Mapping[str, Tensor], folder: str | Path) -> None:
        """Write the deltas among a model's weights, `state`, into `folder` as peft does."""
        write_peft(folder, self.rank, self.alpha, self.targets, _deltas(state))


def _deltas(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The maps down and up by the name of the map that they stand beside."""
    names = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
    return {name: (state[f"{name}.lora_A"], state[f"{name}.lora_B"]) for name in names}
