"""What a layer is made of, by name: norms and activations. A config says which; nothing else asks.

Shapes: C hidden size.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": RMSNorm, "rms_offset": OffsetRMSNorm, "layer_bare": BareLayerNorm,
}  # fmt: skip
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu,
}  # fmt: skip
