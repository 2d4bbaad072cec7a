"""Low-rank maps beside a model's linear ones: y = W x + alpha / rank * B A x (LoRA, arXiv 2106.09685).

Two things are made of them. `LoRA` puts them into the model, where all tokens feel them; a `DraftAdapter` stands beside
it, and its deltas are an argument of the forward that only noisy tokens feel. A is the map down, B the map up. Files of
both are peft's.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybrid.common.checks import require
from hybrid.layout import PROBE, Layout

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FURTHER = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern")  # of peft's, not here


class Delta(NamedTuple):
    """`scale * up down x`, with `down` `[rank, in]` and `up` `[out, rank]`."""

    down: Tensor
    up: Tensor
    scale: float


def moved(out: Tensor, x: Tensor, delta: Delta) -> Tensor:
    """What a map makes of `x`, with its delta; in the dtype of `out`."""
    low = F.linear(x, delta.down.to(x.dtype))
    return out + (F.linear(low, delta.up.to(x.dtype)) * delta.scale).to(out.dtype)


class Deltas(NamedTuple):
    """Those of one layer, by the names of its maps, and which tokens feel them."""

    of: Mapping[str, Delta]
    noisy: Tensor | bool


def noisy_slots(layout: Layout) -> Tensor | bool:
    """Which tokens of a forward are noisy: all (True), none (False), or bool `[B or 1, T, 1]`. Probes are not: what
    they say is exact."""
    marked = (layout.stream > 0) & (layout.stream != PROBE)
    if marked.all():
        return True
    return marked[..., None] if marked.any() else False


def mapped(module: nn.Module, name: str, x: Tensor, deltas: Deltas | None) -> Tensor:
    """The map of that name of a module, with its delta where one is active."""
    out: Tensor = getattr(module, name)(x)
    delta = None if deltas is None else deltas.of.get(name)
    if deltas is None or delta is None or deltas.noisy is False:
        return out
    return moved(out, x, delta) if deltas.noisy is True else torch.where(deltas.noisy, moved(out, x, delta), out)


def maps_of(model: Any, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear maps in a model's layers whose own name is one of `targets`, by their names in the model."""
    return {
        f"model.layers.{name}": m
        for name, m in model.model.layers.named_modules()
        if isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] in targets
    }


def chosen_maps(model: Any, rank: int, targets: Iterable[str], settings: str = "") -> dict[str, nn.Linear]:
    """The same, where deltas can stand beside them.

    Raises:
        ValueError: a target that the model does not have, or a rank below 1; `settings` is what they are part of.
    """
    require(rank >= 1, f"{settings}rank is {rank}; it must be at least 1.")
    maps = maps_of(model, targets)
    missing = ", ".join(sorted({*targets} - {name.rsplit(".", 1)[-1] for name in maps}))
    require(not missing, f"{settings}targets: the model has no linear map named {missing} in its layers.")
    return maps


def fresh(
    m: nn.Linear, rank: int, generator: torch.Generator, dtype: torch.dtype | None = None
) -> tuple[nn.Parameter, nn.Parameter]:
    """The maps down and up for `m`, by default in its number format: the first is drawn, the second 0, so that they
    begin as nothing at all."""
    like = m.weight.new_empty(0, dtype=dtype)
    down = torch.empty(rank, m.in_features, device=generator.device)
    nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
    return nn.Parameter(down.to(like)), nn.Parameter(like.new_zeros(m.out_features, rank))


def peft_names(maps: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Maps down and up by the name of what they stand beside, as peft calls each."""
    return {
        f"{PREFIX}{name}.{part}.weight": weight
        for name, both in maps.items()
        for part, weight in zip(("lora_A", "lora_B"), both, strict=True)
    }


def write_peft(
    folder: str | Path, rank: int, alpha: float, targets: Sequence[str], maps: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as peft does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "target_modules": list(targets), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: weight.detach().contiguous() for name, weight in peft_names(maps).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_peft(folder: Path) -> tuple[int, float, list[str], dict[str, Tensor]]:
    """Rank, alpha, targets, and the weights by peft's names.

    Raises:
        ValueError: the folder is no adapter, or of a kind that we do not have.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        odd = [name for name in FURTHER if config.get(name)]
        plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
        named = isinstance(config.get("target_modules"), list)
        if plain and named and not odd:
            return int(config["r"]), float(config["lora_alpha"]), sorted(config["target_modules"]), tensors
    except Exception as error:  # safetensors raises its own kind, and settings can be anything
        raise ValueError(f"draft_adapter: {folder} is no peft adapter folder ({error}).") from error
    kind = ", ".join(odd) or ("peft_type, bias" if not plain else "target_modules is no list of names")
    raise ValueError(f"draft_adapter: {folder} is not a plain LoRA adapter ({kind}).")
