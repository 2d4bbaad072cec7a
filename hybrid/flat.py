"""The layers without gradients, written out flat: the same numbers, with less around them.

One token through a small model is little arithmetic; calling is what takes the time. So modules are not called here,
and weights that meet the same input are one matrix. `Layer` in `backbone.py` is the text to read; this is that text
once more, for speed alone, and the tests hold the two together.

Shapes: B rows, T tokens, N = B x T, C hidden size, H query heads, G key heads, D head size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.attention import attend, rotate
from hybrid.cache import KVCache
from hybrid.layout import AttentionMask

if TYPE_CHECKING:
    from hybrid.backbone import Backbone, Layer, RMSNorm


NARROW = (torch.bfloat16, torch.float16)


class Weights(NamedTuple):
    """One layer's, matrices as `[in, out]`."""

    norm: Tensor
    qkv: Tensor
    bias: Tensor | None
    head_norm: Tensor | None  # [H + G, 1, D]
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Flat:
    """A backbone's forward, with its weights as they are when this is made."""

    @classmethod
    def of(cls, backbone: "Backbone", positions: int) -> "Flat | None":
        """None where layers do more than they say: an adapter, a hook, quantised or sharded weights, autocast."""
        for module in (backbone.embed_tokens, *backbone.layers.modules(), backbone.norm):
            hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            known = type(module).__module__.startswith(("torch.nn.modules.", "hybrid.backbone"))
            if hooked or not known or any(type(p) is not nn.Parameter for p in module.parameters(recurse=False)):
                return None
        return None if torch.is_autocast_enabled(backbone.norm.weight.device.type) else cls(backbone, positions)

    def __init__(self, backbone: "Backbone", positions: int) -> None:
        first = cast("Layer", backbone.layers[0]).self_attn
        self.heads, self.groups, self.size = first.heads, first.groups, first.size
        self.eps, weight = backbone.norm.eps, backbone.embed_tokens.weight
        self.floor = weight.new_tensor((weight.shape[1] * self.eps) ** 0.5)
        self.embedding, self.norm = weight, _scaled(backbone.norm)
        self.layers = [_weights(cast("Layer", layer)) for layer in backbone.layers]
        place = torch.arange(positions, device=weight.device)[None]
        cos, sin, scale = backbone.rope(weight, place)
        self.rope, self.query_scale = torch.cat([cos, sin], -1)[0, 0], None if scale is None else scale[0, 0]

    def __call__(self, ids: Tensor, position: Tensor, mask: AttentionMask, cache: KVCache | None) -> Tensor:
        """`[B, T]` ids to `[B, T, C]` normed hidden states, as `Backbone.forward`."""
        (batch, tokens), width = ids.shape, self.embedding.shape[1]
        both, grouped = self.heads + self.groups, self.heads != self.groups
        cos, sin = F.embedding(position, self.rope)[:, None].chunk(2, -1)
        scale = None if self.query_scale is None else F.embedding(position, self.query_scale)[:, None]
        x = F.embedding(ids, self.embedding).view(-1, width)
        for index, w in enumerate(self.layers):
            joint = torch.mm(self._norm(x, w.norm), w.qkv)
            if w.bias is not None:
                joint += w.bias
            joint = joint.view(batch, tokens, -1, self.size).transpose(1, 2)
            turned, value = joint[:, :both], joint[:, both:]
            if w.head_norm is not None:
                turned = F.rms_norm(turned, (self.size,), None, self.eps) * w.head_norm
            turned = rotate(turned, cos, sin)
            query, key = turned[:, : self.heads], turned[:, self.heads :]
            if scale is not None:
                query = query * scale
            if cache is not None:
                key, value = cache.update(index, key, value)
            out = attend(query, key, value, mask, grouped)
            x = torch.addmm(x, out.transpose(1, 2).reshape(batch * tokens, -1), w.out)
            gate, up = torch.mm(self._norm(x, w.mlp_norm), w.gate_up).chunk(2, 1)
            x = torch.addmm(x, F.silu(gate).mul_(up), w.down)
        return self._norm(x, self.norm).view(batch, tokens, width)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in fewer calls where the dtype is wide: sqrt(mean x^2 + eps) = hypot(|x|, sqrt(C eps)) / sqrt(C)."""
        if weight.dtype in NARROW:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)).mul_(weight)


def _scaled(norm: "RMSNorm") -> Tensor:
    weight = norm.weight
    return weight if weight.dtype in NARROW else weight * len(weight) ** 0.5


def _weights(layer: "Layer") -> Weights:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad():
        head_norm = None
        if attention.q_norm is not None and attention.k_norm is not None:
            per_head = [(attention.q_norm, attention.heads), (attention.k_norm, attention.groups)]
            head_norm = torch.cat([norm.weight.expand(heads, 1, -1) for norm, heads in per_head])
        return Weights(
            norm=_scaled(layer.input_layernorm), qkv=side_by_side(qkv).t(),
            bias=None if attention.q_proj.bias is None else torch.cat([m.bias for m in qkv]), head_norm=head_norm,
            out=attention.o_proj.weight.t(), mlp_norm=_scaled(layer.post_attention_layernorm),
            gate_up=side_by_side([mlp.gate_proj, mlp.up_proj]).t(), down=mlp.down_proj.weight.t(),
        )  # fmt: skip


def side_by_side(maps: Sequence[nn.Linear]) -> Tensor:
    """The weights of `maps` as one matrix `[sum of out, in]`, stored once: the first time they move into one block of
    memory, and from then on each parameter is a view of its part. What writes to a parameter writes to the block."""
    first, parts = maps[0].weight, [m.weight for m in maps]
    places, place = [], first.data_ptr()
    for part in parts:
        places.append(place)
        place += part.nbytes
    # Equal addresses alone could be chance: the block must be one storage.
    one = len({p.untyped_storage().data_ptr() for p in parts}) == 1
    if not one or [p.data_ptr() for p in parts] != places:
        with torch.inference_mode(False), torch.no_grad():  # else the parameters could not be trained any more
            block = torch.cat(parts)
            for m, part in zip(maps, block.split([len(p) for p in parts]), strict=True):
                m.weight.data = part
    return first.data.as_strided((sum(map(len, parts)), first.shape[1]), (first.shape[1], 1))
