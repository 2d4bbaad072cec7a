"""Text under a decoding law: its windows, all seen in one forward because the true text stands before each.

Shapes: B rows, T tokens, S samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid import HybridForCausalLM, Layout
from hybrid.law import Law

SLOTS = 256  # whose logits are in memory at once, as float64


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Rows of text under a decoding law, whose windows are seen all at once: the true text stands before each.

    Attributes:
        ids: int64 `[B, T]`.
        starts: int64 `[B, T]`, where each slot's window begins.
        seeded: bool `[B, T]`, targets that are predicted left to right.
        open: bool `[B, T]`, targets that are masked at first.
        n: int64 `[B, T]`, how many open slots each slot's window has.
        layout: of the noisy view.
    """

    ids: Tensor
    starts: Tensor
    seeded: Tensor
    open: Tensor
    n: Tensor
    layout: Layout

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.ids.shape[1]

    @classmethod
    def of(
        cls, model: HybridForCausalLM, ids: Tensor, target: Tensor, block_size: int | None, seed_tokens: bool
    ) -> "Windows":
        """The windows of a law (see `bound`) on the model's device."""
        law, (batch, length) = Law.of(model.config), ids.shape
        ids, target = ids.to(model.device), target.to(model.device)
        position = torch.arange(length, device=ids.device).expand(batch, length)
        first = target.long().argmax(1, keepdim=True)
        starts = law.starts(position, first, block_size)
        seeded = target & (position == starts) if seed_tokens else torch.zeros_like(target)
        open_ = target & ~seeded
        # What lies behind the targets would tell a window where the text ends.
        last = length - 1 - target.flip(1).long().argmax(1, keepdim=True)
        return cls(
            ids=ids, starts=starts, seeded=seeded, open=open_,
            n=torch.zeros_like(position).scatter_add(1, starts, open_.long()).gather(1, starts),
            layout=law.noisy(starts, torch.where(position <= last, 0, -1)),
        )  # fmt: skip

    def ranks(self, draws: Tensor) -> Tensor:
        """int64 `[B, T]`: each open slot's rank in its window by `draws` in [0, 1), float64 `[B, T]`, from 0."""
        order = (self.starts + draws).masked_fill(~self.open, math.inf).argsort(1).argsort(1)
        ahead = (self.open.long().cumsum(1) - self.open.long()).gather(1, self.starts)  # of the windows before
        return order - ahead

    def nll(self, model: HybridForCausalLM, masked: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """float64 `[B, T]`, twice: -log p of the tokens `wanted` by the noisy view with `masked` hidden (bool `[B, T]`
        both), and of the seeds by the clean one, 0 elsewhere. One forward over both."""
        law, ids = Law.of(model.config), self.ids
        assert law.mask_token_id is not None
        noisy, seeds = ids.masked_fill(masked, law.mask_token_id), torch.zeros_like(ids, dtype=torch.float64)
        before, hidden = model.model.views(ids, torch.zeros_like(ids), noisy, self.layout)
        if before is not None and self.seeded.any():
            seeds = token_nll(model, before.roll(1, 1), ids, self.seeded)
        return token_nll(model, law.predictions(hidden, self.layout), ids, wanted), seeds


def by_rows(
    estimate: Callable[[Tensor, Tensor, Tensor], Tensor], ids: Tensor, target: Tensor, samples: int, batch_size: int
) -> Tensor:
    """float64 `[S, B]`: what `estimate(ids, target, index)` gives for `batch_size` rows at once; `index` numbers the
    draws of all rows, so that neither the batch nor the device changes what a row is given."""
    draws = []
    for sample in range(samples):
        parts = []
        for at in range(0, len(ids), batch_size):
            rows, goal = ids[at : at + batch_size], target[at : at + batch_size]
            index = torch.arange(at, at + len(rows)) * samples + sample
            parts.append(estimate(rows, goal, index).cpu())
        draws.append(torch.cat(parts))
    return torch.stack(draws)


def check_law(model: HybridForCausalLM, ids: Tensor, target: Tensor, block_size: int | None, seed_tokens: bool) -> None:
    """Raise ValueError where the model has no such bound, or the text cannot be scored."""
    check_text(model, ids, target)
    law = Law.of(model.config)
    if law.mask_token_id is None:
        raise ValueError("a pure AR model (mask_token_id is None) has no diffusion bound; use `ar_nll`.")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1.")
    if seed_tokens and not law.seeds:
        raise ValueError(
            f"seed_tokens: clean_attention={law.clean_attention!r} with diffusion_prediction="
            f"{law.diffusion_prediction!r} predicts none; use seed_tokens=False."
        )
    if not law.cached and block_size is not None:
        raise ValueError("block_size: a clean_attention='full' model has one window; use block_size=None.")
    if law.grid is not None and block_size not in (None, law.grid):
        raise ValueError(f"block_size: this model's clean text has a grid of {law.grid}; use that.")


def token_nll(model: HybridForCausalLM, hidden: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
    """float64 `[B, T]`: -log p of `ids` where `wanted`, 0 elsewhere; the mask token has no probability.

    Args:
        hidden: `[B, T, C]`, the states that predict `ids`.
    """
    nll = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    parts = zip(hidden[wanted].split(SLOTS), ids[wanted].split(SLOTS), strict=True)
    law = Law.of(model.config)
    logits = ((law.without_mask(model.lm_head(states)).double(), tokens) for states, tokens in parts)
    nll[wanted] = torch.cat([nll.new_zeros(0), *(F.cross_entropy(x, y, reduction="none") for x, y in logits)])
    return nll


def check_text(model: HybridForCausalLM, ids: Tensor, target: Tensor) -> None:
    """Raise ValueError unless each row has something before what is scored, and fits the context."""
    if ids.shape != target.shape or ids.ndim != 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)} and target {tuple(target.shape)}; both must be [B, T].")
    if target[:, 0].any():
        raise ValueError("target: a row's first token cannot be scored, nothing is before it; begin rows with bos.")
    if not target.any(1).all():
        raise ValueError("target: a row without targets; leave such rows out.")
    if ids.shape[1] > model.config.max_position_embeddings:
        raise ValueError(
            f"rows have {ids.shape[1]} tokens, and max_position_embeddings is {model.config.max_position_embeddings}: "
            "cut the text into shorter rows (see `slices`)."
        )
