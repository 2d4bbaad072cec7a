"""A low-rank adapter that is active while drafting only (arXiv 2106.09685; Nemotron-Labs-Diffusion, arXiv 2607.05722).

Its deltas are multiplied by (stream > 0), in training and decoding alike: what is clean is computed as without it, bit
for bit, and it works in forwards that verify and draft at once. Files are peft's.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hybrid.adapters.draft_head import RANK, DraftHead, words_of
from hybrid.adapters.low_rank import Delta
from hybrid.checkpoints.place import place
from hybrid.model import HybridForCausalLM

PREFIX = "base_model.model."
HEAD = "draft_head.safetensors"  # beside peft's files, for adapters that have one
FURTHER = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")  # of peft's, not here


class DraftAdapter(nn.Module):
    """Low-rank deltas `scale * B A x` beside some of a model's linear maps, on noisy streams.

    Args:
        model: the model it is for; only the sizes of its maps are looked at.
        rank: of the deltas.
        alpha: scale x rank.
        targets: names of the maps, as in peft's `target_modules`.
        generator: of the maps down; by default one that is always seeded alike. The maps up begin at 0.
        dtype: of the deltas' weights; by default the model's.
        head_size, words, head_rank: of a head that guesses ahead (`DraftHead`), in place of the model's own if that has
            one; None: no head. `words` are token ids, or how many of the first; None: all. With the model's hidden size
            as `head_rank` its output is the model's own. With a head, `targets` may be empty.

    Attributes:
        head: the `DraftHead`, or None.

    Raises:
        ValueError: a target that the model does not have, or a rank below 1.
    """

    def __init__(
        self, model: HybridForCausalLM, rank: int = 16, alpha: float = 32.0, targets: Sequence[str] = ("o_proj",), *,
        generator: torch.Generator | None = None, dtype: torch.dtype | None = None, head_size: int | None = None,
        words: int | Sequence[int] | None = None, head_rank: int = RANK,
    ) -> None:  # fmt: skip
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is {rank}; it must be at least 1.")
        self.rank, self.alpha, self.targets = rank, float(alpha), tuple(targets)
        maps, self.layers = _maps(model, self.targets), model.config.num_hidden_layers
        missing = [t for t in self.targets if not any(name.rsplit(".", 1)[-1] == t for name in maps)]
        if missing:
            raise ValueError(f"targets: the model has no linear map named {', '.join(missing)} in its layers.")
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        source = torch.Generator().manual_seed(0) if generator is None else generator
        for name, m in maps.items():
            key, like = _key(name), m.weight.new_empty(0, dtype=dtype)
            down = torch.empty(rank, m.in_features, device=source.device)
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=source)
            self.down[key] = nn.Parameter(down.to(like))
            self.up[key] = nn.Parameter(like.new_zeros(m.out_features, rank))  # so that it begins as nothing at all
        self.head: DraftHead | None = None
        if head_size is not None:
            config = model.config
            ids = words_of(config.vocab_size, words, config.mask_token_id)
            self.head = DraftHead(config.hidden_size, head_size, ids, head_rank).to(source.device).reset(source)
            if head_rank == config.hidden_size:
                self.head.speak_like(model.lm_head.weight.to(source.device))
            self.head.to(model.device, dtype or model.dtype)

    def check(self, model: HybridForCausalLM) -> None:
        """Raise ValueError where the maps of `model` have other sizes."""
        for name, m in _maps(model, self.targets).items():
            key = _key(name)
            if key not in self.down or self.down[key].shape[1] != m.in_features or len(self.up[key]) != m.out_features:
                raise ValueError(f"draft_adapter is for another model: it does not fit {name}.")
        if self.head is not None:
            width, last = self.head.sizes[0], int(self.head.ids.max())
            if width != model.config.hidden_size or last >= model.config.vocab_size:
                raise ValueError("draft_adapter is for another model: its head does not fit the hidden states.")

    def deltas(self) -> list[dict[str, Delta]]:
        """Of each layer, by the names of its maps."""
        found: list[dict[str, Delta]] = [{} for _ in range(self.layers)]
        for key, down in self.down.items():
            *_, layer, _module, name = key.split("/")
            found[int(layer)][name] = Delta(down, self.up[key], self.alpha / self.rank)
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, as peft does."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank, "lora_alpha": self.alpha,
            "target_modules": list(self.targets), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "inference_mode": True, "base_model_name_or_path": None,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        parts = (("lora_A", self.down), ("lora_B", self.up))
        tensors = {
            f"{PREFIX}{key.replace('/', '.')}.{part}.weight": p.detach().contiguous()
            for part, group in parts
            for key, p in group.items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if self.head is not None:
            self.head.save(folder / HEAD)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: HybridForCausalLM) -> "DraftAdapter":
        """Read a LoRA adapter of peft's format for `model`: a folder, or the name of a shipped one.

        Raises:
            ValueError: the folder is no adapter, is of a kind that this is not, or does not fit the model.
        """
        folder = Path(place(folder, "adapter_config.json"))
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
        except Exception as error:  # safetensors raises its own kind
            raise ValueError(f"draft_adapter: {folder} is no peft adapter folder ({error}).") from error
        odd = [name for name in FURTHER if config.get(name)]
        if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
            kind = ", ".join(odd) or "peft_type, bias"
            raise ValueError(f"draft_adapter: {folder} is not a plain LoRA adapter ({kind}).")
        adapter = cls(model, int(config["r"]), float(config["lora_alpha"]), sorted(config["target_modules"]))
        if (folder / HEAD).exists():
            adapter.head = DraftHead.load(folder / HEAD, model.config.hidden_size).to(model.device, model.dtype)
        own = {
            f"{PREFIX}{key.replace('/', '.')}.{part}.weight": p
            for part, group in (("lora_A", adapter.down), ("lora_B", adapter.up))
            for key, p in group.items()
        }
        wrong = sorted(set(own) ^ set(tensors)) or [n for n, p in own.items() if p.shape != tensors[n].shape]
        if wrong:
            problem = f"{wrong[0]} is missing, extra or misshapen"
            raise ValueError(f"draft_adapter: {folder} does not fit the model: {problem}.")
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(tensors[name])
        return adapter


def _maps(model: HybridForCausalLM, targets: Sequence[str]) -> dict[str, nn.Linear]:
    return {
        f"model.layers.{name}": m
        for name, m in model.model.layers.named_modules()
        if isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] in targets
    }


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ParameterDict takes no dots
