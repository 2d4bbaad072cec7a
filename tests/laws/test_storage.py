"""Weights that decoding and training put side by side somewhere share no memory in the model: what saves models by
their storages (safetensors, accelerate) would drop all but one, and one that is trained would move the others."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import texts, tiny
from safetensors.torch import load_file, save_model

from hybrid import HybridForCausalLM
from hybrid.adapters.lora import LoRA

IDS = torch.tensor(texts(0, [6, 6]))


def spans(model: HybridForCausalLM) -> list[tuple[int, int, str]]:
    """The memory of each weight, tied ones once."""
    weights = {id(w): (name, w) for name, w in model.named_parameters()}
    found = [(w.untyped_storage().data_ptr(), w.untyped_storage().nbytes(), name) for name, w in weights.values()]
    for name, weight in weights.values():
        assert weight.untyped_storage().nbytes() == weight.nbytes, f"{name} is a part of something larger"
    return sorted(found)


def made(tmp_path: Path) -> dict[str, Any]:
    """A model by every way in which one comes about."""
    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="3KB")
    tuned = tiny(dtype=torch.float32)
    LoRA(rank=2).insert(tuned, 0)
    return {
        "new": model, "biased and tied": tiny(dtype=torch.float32, attention_bias=True, tie_word_embeddings=True),
        "of one file": HybridForCausalLM.from_pretrained(tmp_path / "whole"),
        "of several": HybridForCausalLM.from_pretrained(tmp_path / "parts"),
        "narrow": HybridForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16),
        "copied": copy.deepcopy(model), "cast": tiny().to(torch.float32), "low rank": tuned,
    }  # fmt: skip


WAYS = ["new", "biased and tied", "of one file", "of several", "narrow", "copied", "cast", "low rank"]


@pytest.mark.parametrize("way", WAYS)
def test_no_two_weights_share_memory(way: str, tmp_path: Path) -> None:
    model = made(tmp_path)[way]
    for act in ("nothing", "decoding", "training", "decoding again"):
        if act.startswith("decoding"):
            for mode in ("ar", "block", "diffusion", "speculative"):
                model.generate(IDS, mode=mode, max_new_tokens=5)
        elif act == "training":
            optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
            for _ in range(2):
                model(IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        if way not in ("of one file", "of several"):  # mapped files are one storage, whose parts do not overlap
            for (begin, size, one), (other, _, two) in itertools.pairwise(spans(model)):
                assert begin + size <= other, f"{one} and {two} after {act}"
        places = sorted((w.data_ptr(), w.nbytes, name) for name, w in model.named_parameters())
        for (begin, size, one), (other, _, two) in itertools.pairwise(places):
            assert begin + size <= other, f"{one} and {two} overlap after {act}"
    want = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_model(model, str(tmp_path / "all.safetensors"))
    found = load_file(tmp_path / "all.safetensors")
    tied = {"lm_head.weight", "model.embed_tokens.weight"} if model.config.tie_word_embeddings else set()
    assert set(want) - set(found) <= tied
    assert all(torch.equal(found[name], want[name]) for name in found)
