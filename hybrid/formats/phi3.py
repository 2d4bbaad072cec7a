"""Phi-4, and Phi-3 where it has neither windows nor stretched positions (arXiv 2404.14219, 2412.08905): Llama with the
maps of attention that meet the same input as one, and likewise those of the MLP. A pure AR model."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Phi3Config

from hybrid.config import HybridConfig
from hybrid.formats import Format, Transform


def queries_keys_values(config: HybridConfig, joint: Tensor) -> Sequence[Tensor]:
    """The maps that lie in one, one below the other."""
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return joint.split([query, key, key])


def gate_up(_config: HybridConfig, joint: Tensor) -> Sequence[Tensor]:
    """Likewise."""
    return joint.chunk(2)


def joined(_config: HybridConfig, *maps: Tensor) -> Sequence[Tensor]:
    """And back."""
    return [torch.cat(maps)]


ATTENTION, MLP = "model.layers.*.self_attn", "model.layers.*.mlp"

FORMAT = Format(
    model_type="phi3",
    like=Phi3Config,
    only=(
        ("resid_pdrop", (0.0, None), "dropout behind attention and MLP"),
        ("embd_pdrop", (0.0, None), "dropout of embeddings"),
    ),
    transforms=(
        Transform(
            theirs=(f"{ATTENTION}.qkv_proj.weight",),
            ours=(f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.v_proj.weight"),
            to_ours=queries_keys_values,
            to_theirs=joined,
        ),
        Transform(
            theirs=(f"{MLP}.gate_up_proj.weight",),
            ours=(f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"),
            to_ours=gate_up,
            to_theirs=joined,
        ),
    ),
    architecture="Phi3ForCausalLM",
    rope=("default",),  # transformers has no other here but longrope
)
