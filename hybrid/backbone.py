"""The transformer: the Llama, Qwen2 and Qwen3 family in one class, under transformers' module names.

Shapes: B rows, T tokens, C hidden size, H query heads, G key heads, D head size, S keys looked at.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hybrid.attention import Rotation, attend, rotate
from hybrid.cache import KVCache
from hybrid.config import HybridConfig
from hybrid.delta import Deltas, mapped, noisy_slots
from hybrid.layout import AttentionMask, Layout, attention_mask

if TYPE_CHECKING:
    from hybrid.adapter import DraftAdapter


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in at least float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class ResidualLinear(nn.Linear):
    """A projection that is added to the residual stream. 2 x layers of them are summed there, so they begin
    smaller by the root of that number, and the stream keeps its size (GPT-2)."""


class Attention(nn.Module):
    """Grouped-query attention; what may be seen is decided before, once for all layers."""

    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.heads, self.groups, self.size = layer, heads, groups, size
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups * size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups * size, bias=config.attention_bias)
        self.o_proj = ResidualLinear(heads * size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rope: Rotation, mask: AttentionMask, cache: KVCache | None, deltas: Deltas | None = None
    ) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            mapped(self, name, x, deltas).view(batch, tokens, -1, self.size) for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = rotate(query, rope.cos, rope.sin), rotate(key, rope.cos, rope.sin)
        if rope.query_scale is not None:
            query = query * rope.query_scale
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        out = attend(query, key, value, mask, self.heads != self.groups)
        return mapped(self, "o_proj", rearrange(out, "b h t d -> b t (h d)"), deltas)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, deltas: Deltas | None = None) -> Tensor:
        gate, up = (mapped(self, name, x, deltas) for name in ("gate_proj", "up_proj"))
        return mapped(self, "down_proj", F.silu(gate) * up, deltas)


class Layer(GradientCheckpointingLayer):  # transformers' switch: activations may be computed again instead of kept
    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: Rotation, mask: AttentionMask, cache: KVCache | None, deltas: Deltas | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, deltas)
        return x + self.mlp(self.post_attention_layernorm(x), deltas)


class Backbone(nn.Module):
    """Token ids and their labels to hidden states."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.flex = config._attn_implementation == "flex_attention"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.query_scaling = config.query_scaling

    def rope(self, like: Tensor, position: Tensor) -> Rotation:
        """What `position` `[B, T]` does to queries and keys, in the dtype of `like`."""
        cos, sin = self.rotary_emb(like, position)
        low, high = sin.chunk(2, -1)
        scale = None
        if self.query_scaling is not None:
            beta, unscaled = self.query_scaling
            scale = (1 + beta * torch.log1p((position // unscaled).float())).to(like.dtype)[:, None, :, None]
        return Rotation(cos[:, None], torch.cat([-low, high], -1)[:, None], scale)

    def forward(
        self, ids: Tensor, layout: Layout, cache: KVCache | None = None, adapter: "DraftAdapter | None" = None
    ) -> Tensor:
        """`[B, T]` ids to `[B, T, C]` normed hidden states; what was in the cache is seen, what is new goes
        in, provisionally. The deltas of `adapter` are felt by noisy tokens only."""
        if cache is None:
            mask = attention_mask(layout, flex=self.flex)
        else:
            key = cache.open(layout, ids)
            mask = attention_mask(layout, key, even=cache.even, flex=self.flex, ends=cache.ends)
        x = self.embed_tokens(ids)
        rope = self.rope(x, layout.position)
        deltas: list[Deltas | None] = [None] * len(self.layers)
        if adapter is not None:
            noisy = noisy_slots(layout)
            deltas = [Deltas(of, noisy) for of in adapter.deltas()]
        for layer, own in zip(self.layers, deltas, strict=True):
            x = layer(x, rope, mask, cache, own)
        return self.norm(x)
