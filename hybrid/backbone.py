"""The transformer: the family of Llama, Qwen, Gemma and OLMo in one class, under transformers' module names.

Shapes: B rows, T tokens, C hidden size, H query heads, G key heads, D head size, S keys looked at.
"""

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from hybrid.adapters.low_rank import Deltas, mapped, noisy_slots
from hybrid.cache import KVCache
from hybrid.checkpoints.pretrained import HybridPreTrainedModel
from hybrid.config import HybridConfig
from hybrid.inputs import Clean, checked_ids
from hybrid.law import Law
from hybrid.layout import AttentionMask, Layout, attention_mask
from hybrid.parts import ACTIVATIONS, NORMS, OffsetRMSNorm, RMSNorm, Rotation, ScaledEmbedding, Steady, attend, rotate

if TYPE_CHECKING:
    from hybrid.adapters.draft_adapter import DraftAdapter


class ResidualLinear(nn.Linear):
    """A projection that is added to the residual stream. 2 x layers of them are summed there, so they begin
    smaller by the root of that number, and the stream keeps its size (GPT-2)."""


class RotaryEmbedding(Steady, LlamaRotaryEmbedding):
    """transformers' own, with frequencies that stay float32 where a model is cast: in bfloat16 the positions of a long
    text would be others than in a model that was loaded in bfloat16."""


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
    """SwiGLU (arXiv 2002.05202), or another activation, or without the gate, as the config says."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias) if config.mlp_gate else None
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = ResidualLinear(inner, size, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    @property
    def into(self) -> list[nn.Linear]:
        """The maps that meet the input."""
        return [self.up_proj] if self.gate_proj is None else [self.gate_proj, self.up_proj]

    def forward(self, x: Tensor, deltas: Deltas | None = None) -> Tensor:
        if self.gate_proj is None:
            return mapped(self, "down_proj", self.activation(mapped(self, "up_proj", x, deltas)), deltas)
        gate, up = (mapped(self, name, x, deltas) for name in ("gate_proj", "up_proj"))
        return mapped(self, "down_proj", self.activation(gate) * up, deltas)


class Layer(GradientCheckpointingLayer):  # transformers' switch: activations may be computed again instead of kept
    def __init__(self, config: HybridConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        norm = NORMS[config.norm]
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: Rotation, mask: AttentionMask, cache: KVCache | None, deltas: Deltas | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, deltas)
        return x + self.mlp(self.post_attention_layernorm(x), deltas)


class HybridModel(HybridPreTrainedModel):
    """Token ids and their labels to hidden states: the transformer without a head."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        embedding = ScaledEmbedding if config.scale_embeddings else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = NORMS[config.norm](config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.query_scaling = config.query_scaling
        self.post_init()

    @property
    def flex(self) -> bool:
        """Whether attention is FlexAttention's."""
        return bool(self.config._attn_implementation == "flex_attention")

    def rope(self, like: Tensor, position: Tensor) -> Rotation:
        """What `position` `[B, T]` does to queries and keys, in the dtype of `like`."""
        cos, sin = self.rotary_emb(like, position)
        low, high = sin.chunk(2, -1)
        scale = None
        if self.query_scaling is not None:
            beta, unscaled = self.query_scaling
            scale = (1 + beta * torch.log1p((position // unscaled).float())).to(like.dtype)[:, None, :, None]
        return Rotation(cos[:, None], torch.cat([-low, high], -1)[:, None], scale)

    def states(
        self, ids: Tensor, layout: Layout, cache: KVCache | None = None, adapter: "DraftAdapter | None" = None,
        embeds: Tensor | None = None, every: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """int64 `[B, T]` ids to `[B, T, C]` normed hidden states, in the model's dtype; what was in the cache is seen,
        what is new goes in, provisionally. The deltas of `adapter` are felt by noisy tokens only.

        Args:
            layout: what each token sees, labels `[4, B, T]`.
            embeds: `[B, T, C]`, in place of the ids' embeddings.
            every: takes what goes into each layer, and what comes out at last.
        """
        if cache is None:
            mask = attention_mask(layout, flex=self.flex)
        else:
            key = cache.open(layout, ids)
            mask = attention_mask(layout, key, even=cache.even, flex=self.flex, ends=cache.ends)
        x = self.embed_tokens(ids) if embeds is None else embeds
        rope = self.rope(x, layout.position)
        deltas: list[Deltas | None] = [None] * len(self.layers)
        if adapter is not None:
            noisy = noisy_slots(layout)
            deltas = [Deltas(of, noisy) for of in adapter.deltas()]
        for layer, own in zip(self.layers, deltas, strict=True):
            if every is not None:
                every.append(x)
            x = layer(x, rope, mask, cache, own)
        x = self.norm(x)
        if every is not None:
            every.append(x)
        return x

    def views(
        self, ids: Tensor, doc: Tensor, noisy: Tensor, layout: Layout, block_size: int | None = None
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """Hidden states of whole rows of clean text, `[B, T, C]`, and of a noisy view of them, `[B, N, C]`, from one
        forward over [x_0 ; x_t]. Without the former where clean text is not to be had beside a view (`Law.cached`).

        Args:
            ids, doc: int64 `[B, T]`, the clean text and its packed documents.
            noisy, layout: int64 `[B, N]`, the view, and what its tokens see.
            block_size: of the clean text's blocks, where they are not the config's.
        """
        law = Law.of(self.config)
        if not law.cached:
            return None, self.states(noisy, layout)
        both = self.states(torch.cat([ids, noisy], 1), law.clean_rows(doc, block_size).beside(layout))
        clean, view = both.tensor_split([ids.shape[1]], dim=1)
        return clean, view

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        layout: Layout | None = None,
        draft_adapter: "DraftAdapter | None" = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Normed hidden states `[B, T, C]` in the model's dtype; arguments as of `HybridForCausalLM.forward`.

        Raises:
            ValueError: an argument that does not go with another, or a cache of another library.
        """
        ids = checked_ids(
            input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, layout, use_cache, kwargs
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        every: list[Tensor] | None = [] if output_hidden_states else None
        if layout is not None:
            hidden = self.states(ids, layout, past_key_values, draft_adapter, inputs_embeds, every)
        else:
            if past_key_values is None and use_cache:
                rows, slots = ids.shape
                past_key_values = KVCache(self.config, rows, slots, self.device, self.dtype)
            text = Clean.of(Law.of(self.config), ids, attention_mask, position_ids, past_key_values)
            embeds = None if inputs_embeds is None else text.packed(inputs_embeds)
            hidden = text.unpacked(self.states(text.packed(ids), text.layout, past_key_values, None, embeds, every))
            if past_key_values is not None:
                past_key_values.commit(text.counts)
            if every is not None:
                every = [text.unpacked(x) for x in every]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=past_key_values,
            hidden_states=None if every is None else tuple(every),
        )  # fmt: skip

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OffsetRMSNorm):  # which transformers takes for another RMSNorm
            init.zeros_(module.weight)
        if isinstance(module, ResidualLinear):
            init.normal_(module.weight, std=self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5)
