"""The layers without gradients, written out flat: the same numbers, with less around them.

One token through a small model is little arithmetic; calling is what takes the time. So modules are not called here,
and weights that meet the same input are one matrix. `Layer` in `backbone.py` is the text to read; this is that text
once more, for speed alone, and the tests hold the two together.

Shapes: B rows, T tokens, N = B x T, C hidden size, H query heads, G key heads, D head size.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.attention import attend, rotate
from hybrid.cache import KVCache
from hybrid.delta import Delta, noisy_slots
from hybrid.layout import Layout, attention_mask

if TYPE_CHECKING:
    from hybrid.adapter import DraftAdapter
    from hybrid.backbone import HybridModel, Layer, RMSNorm
    from hybrid.model import HybridForCausalLM


NARROW = (torch.bfloat16, torch.float16)
_MOVING = threading.Lock()


class LowRank(NamedTuple):
    """The deltas of maps that meet the same input: `[in, ranks]`, `[ranks, out]`, scaled."""

    down: Tensor
    up: Tensor


class Weights(NamedTuple):
    """One layer's, matrices as `[in, out]`; the deltas are those of the maps before them."""

    norm: Tensor
    qkv: Tensor
    bias: Tensor | None
    head_norm: Tensor | None  # [H + G, 1, D]
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_delta: LowRank | None
    out_delta: LowRank | None
    gate_up_delta: LowRank | None
    down_delta: LowRank | None


class Flat:
    """A model's forward, with its weights as they are when this is made: whoever holds it makes it anew when they
    change. Any number of them can serve one model at once."""

    @classmethod
    def of(cls, model: "HybridForCausalLM", positions: int, adapter: "DraftAdapter | None" = None) -> "Flat | None":
        """For text of up to `positions` tokens. None where layers do more than they say: a hook, quantised or sharded
        weights, autocast; or where attention has a kernel of its own."""
        backbone = model.model
        watched: list[nn.Module] = [model, backbone, model.lm_head, backbone.embed_tokens, backbone.norm]
        for module in (*watched, *backbone.layers.modules()):
            hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            known = type(module).__module__.startswith(("torch.nn.modules.", "hybrid."))
            if hooked or not known or any(type(p) is not nn.Parameter for p in module.parameters(recurse=False)):
                return None
        if backbone.flex or torch.is_autocast_enabled(backbone.norm.weight.device.type):
            return None
        return cls(backbone, positions, adapter)

    def __init__(self, backbone: "HybridModel", positions: int, adapter: "DraftAdapter | None" = None) -> None:
        first = cast("Layer", backbone.layers[0]).self_attn
        self.heads, self.groups, self.size = first.heads, first.groups, first.size
        self.eps, weight = backbone.norm.eps, backbone.embed_tokens.weight
        self.floor = weight.new_tensor((weight.shape[1] * self.eps) ** 0.5)
        self.embedding, self.norm = weight, _scaled(backbone.norm)
        nothing: Mapping[str, Delta] = {}
        deltas = [nothing] * len(backbone.layers) if adapter is None else adapter.deltas()
        self.layers = [_weights(cast("Layer", x), d) for x, d in zip(backbone.layers, deltas, strict=True)]
        self.adapted, self._backbone = adapter is not None, backbone
        self.reach(positions)

    def reach(self, positions: int) -> None:
        """Serve text of up to `positions` tokens from now on."""
        place = torch.arange(positions, device=self.embedding.device)[None]
        cos, sin, scale = self._backbone.rope(self.embedding, place)
        self.rope, self.query_scale = torch.cat([cos, sin], -1)[0, 0], None if scale is None else scale[0, 0]

    def __call__(self, ids: Tensor, layout: Layout, cache: KVCache | None) -> Tensor:
        """`[B, T]` ids to `[B, T, C]` normed hidden states, as `HybridModel.states`."""
        if cache is None:
            mask = attention_mask(layout)
        else:
            seen = cache.open(layout, ids)
            mask = attention_mask(layout, seen, even=cache.even, ends=cache.ends)
        noisy = noisy_slots(layout) if self.adapted else False
        (batch, tokens), width = ids.shape, self.embedding.shape[1]
        both, grouped = self.heads + self.groups, self.heads != self.groups
        cos, sin = F.embedding(layout.position, self.rope)[:, None].chunk(2, -1)
        scale = None if self.query_scale is None else F.embedding(layout.position, self.query_scale)[:, None]
        x = F.embedding(ids, self.embedding).view(-1, width)
        if isinstance(noisy, Tensor):
            noisy = noisy.expand(batch, -1, -1).reshape(-1, 1)
        for index, w in enumerate(self.layers):
            normed = self._norm(x, w.norm)
            joint = _added(torch.mm(normed, w.qkv), normed, w.qkv_delta, noisy)
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
            out = out.transpose(1, 2).reshape(batch * tokens, -1)
            x = _added(torch.addmm(x, out, w.out), out, w.out_delta, noisy)
            normed = self._norm(x, w.mlp_norm)
            gate, up = _added(torch.mm(normed, w.gate_up), normed, w.gate_up_delta, noisy).chunk(2, 1)
            inner = F.silu(gate).mul_(up)
            x = _added(torch.addmm(x, inner, w.down), inner, w.down_delta, noisy)
        return self._norm(x, self.norm).view(batch, tokens, width)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in fewer calls where the dtype is wide: sqrt(mean x^2 + eps) = hypot(|x|, sqrt(C eps)) / sqrt(C)."""
        if weight.dtype in NARROW:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)).mul_(weight)


def _scaled(norm: "RMSNorm") -> Tensor:
    weight = norm.weight
    return weight if weight.dtype in NARROW else weight * len(weight) ** 0.5


def _weights(layer: "Layer", deltas: Mapping[str, Delta]) -> Weights:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]

    def low_rank(*names: str) -> LowRank | None:
        maps = [getattr(attention if name in ("q_proj", "k_proj", "v_proj", "o_proj") else mlp, name) for name in names]
        return _low_rank(maps, [deltas.get(name) for name in names])

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
            qkv_delta=low_rank("q_proj", "k_proj", "v_proj"), out_delta=low_rank("o_proj"),
            gate_up_delta=low_rank("gate_proj", "up_proj"), down_delta=low_rank("down_proj"),
        )  # fmt: skip


def _added(out: Tensor, x: Tensor, delta: LowRank | None, noisy: Tensor | bool) -> Tensor:
    """`out` with the delta of `x` in the rows that are `noisy`."""
    if delta is None or noisy is False:
        return out
    low = torch.mm(x, delta.down)
    return out.addmm_(low if noisy is True else low * noisy, delta.up)


def _low_rank(maps: Sequence[nn.Linear], deltas: Sequence[Delta | None]) -> LowRank | None:
    """The deltas of `maps` as one: what is narrow side by side, what is wide along the diagonal."""
    found = [d for d in deltas if d is not None]
    if not found:
        return None
    like = maps[0].weight
    down = torch.cat([d.down for d in found]).to(like.dtype).t()
    up = torch.zeros(down.shape[1], sum(m.out_features for m in maps), dtype=like.dtype, device=like.device)
    row = column = 0
    for m, d in zip(maps, deltas, strict=True):
        if d is not None:
            up[row : row + len(d.down), column : column + m.out_features] = d.up.t() * d.scale
            row += len(d.down)
        column += m.out_features
    return LowRank(down, up)


def side_by_side(maps: Sequence[nn.Linear]) -> Tensor:
    """The weights of `maps` as one matrix `[sum of out, in]`, stored once: the first time they move into one block of
    memory, and from then on each parameter is a view of its part. What writes to a parameter writes to the block."""
    first, parts = maps[0].weight, [m.weight for m in maps]
    with _MOVING:  # two threads may begin to decode with one model at once
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
