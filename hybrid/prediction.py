"""From raw logits to what the masked slots predict: the one place that knows the convention."""

import torch
from torch import Tensor

from hybrid.config import HybridConfig
from hybrid.layout import Layout


def without_mask(logits: Tensor, config: HybridConfig) -> Tensor:
    """`[..., V]` logits with the mask token at -inf: it stands for a question and is never an answer."""
    if config.mask_token_id is None:
        return logits
    logits = logits.clone()
    logits[..., config.mask_token_id] = -torch.inf
    return logits


def predictions(hidden: Tensor, layout: Layout, config: HybridConfig) -> Tensor:
    """Row i of the result is what predicts slot i, given its hidden state or logits `[B, T, ...]`.

    "in_place": a slot predicts its own token (Nemotron-Labs-Diffusion, LLaDA, SDAR, BD3-LM). "next": a slot
    predicts the one after it (Dream, Fast-dLLM v2), so slot i takes row i-1; the first slot of a block (and of a
    document packed into it) has nobody before it in its own view and keeps its own row, as both sources do.
    """
    if config.diffusion_prediction == "in_place":
        return hidden
    before = hidden.roll(1, dims=1)
    first = (layout.position == layout.block) | (layout.doc != layout.doc.roll(1, dims=-1))
    first = first.expand(hidden.shape[:2])
    return torch.where(first.unflatten(1, (-1,) + (1,) * (hidden.ndim - 2)), hidden, before)
