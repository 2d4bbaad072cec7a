"""The layers without gradients, written out flat: the same numbers, with less around them.

One token through a small model is little arithmetic; calling is what takes the time. So modules are not called here,
and weights that meet the same input are one matrix where that is a small one. Larger ones are multiplied by whatever
kernel is fastest here (`kernels.py`). `Layer` in `backbone.py` is the text to read; this is that text once more, for
speed alone, and the tests hold the two together. The model stays as it was: what is derived from it lies elsewhere.

Shapes: B rows, T tokens, N = B x T, C hidden size, H query heads, G key heads, D head size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.adapters.low_rank import Delta, noisy_slots
from hybrid.backbone import MLP, Attention, HybridModel, Layer, ResidualLinear
from hybrid.cache import KVCache
from hybrid.fast.kernels import Map, measurable
from hybrid.layout import Layout, attention_mask
from hybrid.model import HybridForCausalLM
from hybrid.parts import ACTIVATIONS, NORMS, RMSNorm, ScaledEmbedding, attend, rotate

if TYPE_CHECKING:
    from hybrid.adapters.draft_adapter import DraftAdapter


def _acts(kind: Any) -> tuple[Any, ...]:
    return kind.forward, getattr(kind, "states", None)


# The classes that are written out here, and what they did when this was written.
PLAIN = {
    kind: _acts(kind)
    for kind in (
        HybridForCausalLM, HybridModel, Layer, Attention, MLP, *NORMS.values(), ResidualLinear, nn.Linear, nn.Embedding,
        ScaledEmbedding, nn.ModuleList,
    )
}  # fmt: skip
NARROW = (torch.bfloat16, torch.float16)
# Bytes of weights, in all layers, that are put side by side for each Flat anew: it saves calls, which are what small
# models spend their time on, and takes time and memory itself, of which an accelerator has more.
COPIED = {"cpu": 4 << 20, "elsewhere": 1 << 30}


Norm = Callable[[Tensor], Tensor]


class LowRank(NamedTuple):
    """The deltas of maps that meet the same input: `[in, ranks]`, `[ranks, out]`, scaled."""

    down: Tensor
    up: Tensor


class Joint(NamedTuple):
    """Maps that meet the same input, as one, and what a draft adapter adds to them."""

    map: Map
    delta: LowRank | None

    def __call__(self, x: Tensor, noisy: Tensor | bool, onto: Tensor | None = None) -> Tensor:
        """The product of `[N, in]`, added to `onto`, with the delta in the rows that are `noisy`."""
        out = self.map(x, onto)
        if self.delta is None or noisy is False:
            return out
        low = torch.mm(x, self.delta.down)
        return out.addmm_(low if noisy is True else low * noisy, self.delta.up)


class Weights(NamedTuple):
    """One layer's."""

    norm: Norm
    qkv: Joint
    head_norm: Tensor | None  # [H + G, 1, D]
    out: Joint
    mlp_norm: Norm
    gate_up: Joint
    gated: bool
    down: Joint


class Flat:
    """A model's forward, with its weights as they are when this is made: whoever holds it makes it anew when they
    change. Any number of them can serve one model at once."""

    @classmethod
    def of(
        cls, model: HybridForCausalLM, positions: int, adapter: "DraftAdapter | None" = None, measured: bool = True
    ) -> "Flat | None":
        """For text of up to `positions` tokens. None where layers do something else than they say: a hook, another
        class or method, quantised or sharded weights, autocast; or where attention has a kernel of its own. `measured`:
        choose kernels, instead of torch's products alone."""
        backbone = model.model
        if nn.modules.module._has_any_global_hook() or not _plain(model):
            return None
        if backbone.flex or torch.is_autocast_enabled(backbone.embed_tokens.weight.device.type):
            return None
        return cls(model, positions, adapter, measured)

    def __init__(
        self, model: HybridForCausalLM, positions: int, adapter: "DraftAdapter | None", measured: bool
    ) -> None:
        backbone = model.model
        first = cast(Layer, backbone.layers[0]).self_attn
        self.heads, self.groups, self.size = first.heads, first.groups, first.size
        weight, config = backbone.embed_tokens.weight, backbone.config
        self.eps, self.activation = config.rms_norm_eps, ACTIVATIONS[config.hidden_act]
        self.embedding, self.norm = weight, _norm(backbone.norm)
        self.scale = weight.new_tensor(config.hidden_size**0.5) if config.scale_embeddings else None
        nothing: Mapping[str, Delta] = {}
        deltas = [nothing] * len(backbone.layers) if adapter is None else adapter.deltas()
        layers = [cast(Layer, x) for x in backbone.layers]
        together = len(layers) * sum(m.weight.nbytes for maps in _together(layers[0]) for m in maps)
        copied = together <= COPIED.get(weight.device.type, COPIED["elsewhere"])
        measured = measured and measurable(weight, sum(p.nbytes for p in _parameters(backbone)))
        self.layers = [_weights(x, d, copied, measured) for x, d in zip(layers, deltas, strict=True)]
        self._head = Map([model.lm_head], measured=measured)
        self.adapted, self._backbone = any(deltas), backbone
        self._parameters = [*_parameters(model), *(() if adapter is None else _parameters(adapter))]
        self._written = _written(self._parameters)
        self._seconds: dict[int, float] = {}
        self.reach(positions)

    def reach(self, positions: int) -> None:
        """Serve text of up to `positions` tokens from now on."""
        position = torch.arange(positions, device=self.embedding.device)[None]
        cos, sin, scale = self._backbone.rope(self.embedding, position)
        self.rope, self.query_scale = torch.cat([cos, sin], -1)[0, 0], None if scale is None else scale[0, 0]

    @property
    def outdated(self) -> bool:
        """Whether torch has counted a write to a parameter, or moved one, since this was made: cheap enough to ask
        before every forward, while only reading the weights tells of writes behind torch's back (`packs.py`)."""
        return _written(self._parameters) != self._written

    def seconds(self, rows: int) -> float:
        """What the products of a forward of so many slots take; 0 where nothing was measured."""
        if rows not in self._seconds:
            one = self.layers[0]
            layer = sum(joint.map.seconds(rows) for joint in (one.qkv, one.out, one.gate_up, one.down))
            self._seconds[rows] = len(self.layers) * layer + self.head_seconds(rows)
        return self._seconds[rows]

    def head_seconds(self, rows: int) -> float:
        """What so many rows of logits take."""
        return self._head.seconds(rows)

    def head(self, hidden: Tensor) -> Tensor:
        """Normed hidden states `[N, C]` to logits `[N, V]`."""
        return self._head(hidden)

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
        if self.scale is not None:
            x = x * self.scale
        if isinstance(noisy, Tensor):
            noisy = noisy.expand(batch, -1, -1).reshape(-1, 1)
        for index, w in enumerate(self.layers):
            joint = w.qkv(w.norm(x), noisy).view(batch, tokens, -1, self.size).transpose(1, 2)
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
            x = w.out(out, noisy, onto=x)
            inner = w.gate_up(w.mlp_norm(x), noisy)
            if w.gated:
                gate, up = inner.chunk(2, 1)
                inner = self.activation(gate).mul_(up)
            else:
                inner = self.activation(inner)
            x = w.down(inner, noisy, onto=x)
        return self.norm(x).view(batch, tokens, width)


def _plain(model: HybridForCausalLM) -> bool:
    """Whether every module of the forward is of a class that is written out here, and as that class makes it."""
    backbone = model.model
    eps, activation = backbone.config.rms_norm_eps, ACTIVATIONS[backbone.config.hidden_act]
    modules: list[nn.Module] = [model, backbone, model.lm_head, backbone.embed_tokens, backbone.norm]
    for module in (*modules, *_modules(backbone.layers)):
        if PLAIN.get(type(module)) != _acts(type(module)) or not {"forward", "states"}.isdisjoint(vars(module)):
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None):
            return False
        if isinstance(module, RMSNorm) and module.eps != eps:
            return False
        if isinstance(module, MLP) and module.activation is not activation:
            return False
    together = [maps for layer in backbone.layers for maps in _together(cast(Layer, layer))]
    one_kind = all(len({m.bias is None for m in maps}) == 1 for maps in together)
    return one_kind and backbone.embed_tokens.max_norm is None  # which is applied to the weights when they are read


def _modules(root: nn.Module) -> list[nn.Module]:
    """It and all inside it. torch's own walks take as long as a token of a small model, and this one is done every
    call."""
    found = [root]
    for module in found:
        found += [inner for inner in module._modules.values() if inner is not None]
    return found


def _parameters(root: nn.Module) -> list[Tensor]:
    return [p for module in _modules(root) for p in module._parameters.values() if p is not None]


def _written(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(0 if p.is_inference() else p._version, p.data_ptr()) for p in parameters]


def _norm(norm: nn.Module) -> Norm:
    """The norm in as few calls as it takes; one that is not written out here, as it is.

    RMSNorm, where the dtype is wide: sqrt(mean x^2 + eps) = hypot(|x|, sqrt(C eps)) / sqrt(C).
    """
    if type(norm) is not RMSNorm:
        return norm
    weight, eps, size = norm.weight, norm.eps, len(norm.weight)
    if weight.dtype in NARROW:
        return lambda x: F.rms_norm(x, weight.shape, weight, eps)
    scaled, floor = weight * size**0.5, weight.new_tensor((size * eps) ** 0.5)
    return lambda x: (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)).mul_(scaled)


def _together(layer: Layer) -> list[list[nn.Linear]]:
    """The maps that meet the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [[attention.q_proj, attention.k_proj, attention.v_proj], mlp.into]


def _weights(layer: Layer, deltas: Mapping[str, Delta], copied: bool, measured: bool) -> Weights:
    attention, mlp = layer.self_attn, layer.mlp

    def joint(module: nn.Module, *names: str, copied: bool = False) -> Joint:
        maps = [getattr(module, name) for name in names]
        delta = None if deltas.keys().isdisjoint(names) else _low_rank(maps, [deltas.get(name) for name in names])
        return Joint(Map(maps, copied=copied, measured=measured), delta)

    with torch.no_grad():
        head_norm = None
        if attention.q_norm is not None and attention.k_norm is not None:
            per_head = [(attention.q_norm, attention.heads), (attention.k_norm, attention.groups)]
            head_norm = torch.cat([norm.weight.expand(heads, 1, -1) for norm, heads in per_head])
        gated = mlp.gate_proj is not None
        return Weights(
            norm=_norm(layer.input_layernorm), qkv=joint(attention, "q_proj", "k_proj", "v_proj", copied=copied),
            head_norm=head_norm, out=joint(attention, "o_proj"), mlp_norm=_norm(layer.post_attention_layernorm),
            gate_up=joint(mlp, *(["gate_proj"] if gated else []), "up_proj", copied=copied), gated=gated,
            down=joint(mlp, "down_proj"),
        )  # fmt: skip


def _low_rank(maps: Sequence[nn.Linear], deltas: Sequence[Delta | None]) -> LowRank:
    """The deltas of `maps` as one: what is narrow side by side, what is wide along the diagonal."""
    found = [d for d in deltas if d is not None]
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
