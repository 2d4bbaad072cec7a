"""Low-rank fine-tuning (LoRA, arXiv 2106.09685): y = W x + alpha / rank * B A x, in which only A and B are learned.

Unlike a `DraftAdapter`, which is of the same kind, the deltas act on all streams, so that they change the model itself.
What a job saves is an ordinary model, in which W + alpha / rank * B A stands for W, and beside it the deltas alone in
peft's format.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid import HybridForCausalLM
from hybrid.adapters.draft_adapter import DraftAdapter

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRankLinear(nn.Module):
    """A frozen linear map and its delta, with the names that the map had, and `lora_A`, `lora_B` beside them."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, scale
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))  # begins as nothing at all
        if not base.weight.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=5**0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


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
            ValueError: a target that the model does not have, or a rank below 1.
        """
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1.")
        layers = model.model.layers
        maps = {name: m for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
        chosen = {name: m for name, m in maps.items() if name.rsplit(".", 1)[-1] in self.targets}
        if missing := sorted(set(self.targets) - {name.rsplit(".", 1)[-1] for name in chosen}):
            raise ValueError(f"lora.targets: the model has no linear map named {', '.join(missing)} in its layers.")
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for name, base in chosen.items():
            place, _, last = name.rpartition(".")
            both = LowRankLinear(base, self.rank, self.alpha / self.rank, generator)
            setattr(layers.get_submodule(place), last, both)

    def merged(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the model that says the same without deltas."""
        deltas = {name for name in state if name.endswith((".lora_A", ".lora_B"))}
        found = {name: weight for name, weight in state.items() if name not in deltas}
        for name in sorted(x.removesuffix("lora_A") for x in deltas if x.endswith(".lora_A")):
            down, up, weight = (state[name + part] for part in ("lora_A", "lora_B", "weight"))
            delta = up.float() @ down.float() * (self.alpha / self.rank)
            found[name + "weight"] = (weight.float() + delta).to(weight.dtype)
        return found

    def save(self, model: HybridForCausalLM, state: dict[str, Tensor], folder: Path) -> None:
        """Write the deltas in `state` into `folder` as peft does; `model` is an ordinary one of the same size."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            adapter = DraftAdapter(model, self.rank, self.alpha, self.targets)
            for part, group in (("lora_A", adapter.down), ("lora_B", adapter.up)):
                for key, parameter in group.items():
                    parameter.copy_(state[f"{key.replace('/', '.')}.{part}"])
        adapter.save_pretrained(folder)


