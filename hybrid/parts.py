"""What a layer is made of: norms and activations by name (a config says which; nothing else asks), rotary positions and
attention, on tensors.

Shapes: B rows, T tokens, C hidden size, H query heads, D head size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from hybrid.layout import AttentionMask


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in at least float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


class OffsetRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) in float32, and only then narrowed: Gemma's (arXiv 2403.08295). A stored 1 + weight
    would lose what bfloat16 keeps of a small weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, 1 + self.weight.to(wide), self.eps).to(self.weight.dtype)


class BareLayerNorm(nn.Module):
    """(x - mean) / deviation in at least float32, without weights: OLMo's (arXiv 2402.00838, section 2.1)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), (self.size,), eps=self.eps).to(x.dtype)


class ScaledEmbedding(nn.Embedding):
    """Times the root of its size, in the number format of the weights (Gemma)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.new_tensor(self.embedding_dim**0.5)


class Steady(nn.Module):
    """Its buffers follow it from device to device, and stay what they are when it is cast or emptied."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": RMSNorm, "rms_offset": OffsetRMSNorm, "layer_bare": BareLayerNorm,
}  # fmt: skip
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"), "relu": F.relu,
}  # fmt: skip


class Rotation(NamedTuple):
    """What the positions of one forward do to queries and keys; each broadcasts over heads."""

    cos: Tensor  # [B, 1, T, D]
    sin: Tensor  # [B, 1, T, D], signed for `rotate`
    query_scale: Tensor | None  # [B, 1, T, 1]: rotated queries are multiplied by it


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on `[B, heads, T, D]`; `sin` carries the sign of the rotated half, so that half is one roll."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    # Fused only when compiled, and the compiled kernel has no backward on CPU.
    return cast(Any, flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, grouped: bool) -> Tensor:
    """softmax(q k / sqrt(D)) v where the mask allows it, `[B, H, T, D]`."""
    if mask.block is not None:
        return cast(Tensor, _flex(query.device.type)(query, key, value, block_mask=mask.block, enable_gqa=grouped))
    autocast = torch.is_autocast_enabled("cpu")
    if query.device.type == "cpu" and query.requires_grad and (autocast or query.dtype == torch.bfloat16):
        # The CPU kernel's backward is several times slower in bfloat16 than in float32.
        with torch.autocast("cpu", enabled=False):
            out = _masked(query.float(), key.float(), value.float(), mask, grouped)
        return out if autocast else out.to(query.dtype)
    return _masked(query, key, value, mask, grouped)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, grouped: bool) -> Tensor:
    if mask.first is not None:
        return _halves(query, key, value, mask, grouped)
    if mask.ends is not None:
        return torch.cat([_alone(query, key, value, mask, grouped, row) for row in range(len(query))])
    return F.scaled_dot_product_attention(
        query, key, value, mask.dense, is_causal=mask.is_causal, enable_gqa=grouped
    )


def _alone(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, grouped: bool, row: int) -> Tensor:
    """One row, without the keys that only longer rows have."""
    assert mask.ends is not None
    rows, end = slice(row, row + 1), mask.ends[row]
    dense = None if mask.dense is None else mask.dense[rows, ..., :end]
    return F.scaled_dot_product_attention(
        query[rows], key[rows, :, :end], value[rows, :, :end], dense, enable_gqa=grouped
    )


# Compiled, it would fuse nothing, and the CPU's lowering fails on parts of tensors whose shapes vary.
@torch.compiler.disable
def _halves(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, grouped: bool) -> Tensor:
    """A clean half that is causal needs no mask, and no half meets keys of which it sees none."""
    assert mask.first is not None and mask.dense is not None
    seam = query.shape[2] - mask.dense.shape[2]
    alone = _masked(query[:, :, :seam], key[:, :, :seam], value[:, :, :seam], mask.first, grouped)
    return torch.cat([alone, _masked(query[:, :, seam:], key, value, mask._replace(first=None), grouped)], 2)
