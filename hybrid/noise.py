"""Noise: which slots of the noisy view are masked, and what each is worth in the loss.

A schedule turns a time t in [0, 1] into a masking probability p(t); its weight p'(t) / p(t) makes the weighted
cross-entropy at masked slots a bound of the negative log-likelihood (MDLM, arXiv 2406.07524, equation 10). All
noise is a function of (seed, index of the sample): neither the batch split nor the number of processes
changes it.

Shapes: B rows, T tokens.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybrid.common.checks import check_choices, require
from hybrid.common.lazy import function_of
from hybrid.config import HybridConfig
from hybrid.law import Law
from hybrid.layout import Layout

# Additive recurrences with these steps cover [0, 1) evenly in both indices at once (the plastic number's powers).
ROW_STEP, BLOCK_STEP = 0.7548776662466927, 0.5698402909980532


def linear(t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """p = (1-eps) t + eps, weight 1/p (LLaDA, arXiv 2502.09992, whose eps is 1e-3).

    MDLM's log-linear schedule is the same: sigma(t) = -log(1 - (1-eps) t) is linear in the logarithm of the signal
    kept, and the masking probability 1 - exp(-sigma) is (1-eps) t, with weight sigma' / (exp(sigma) - 1) = 1/t
    (arXiv 2406.07524, its appendix on noise schedules). Where eps enters is all that differs, by a share of at most
    eps for the t in [eps, 1] that MDLM draws.
    """
    p = (1 - eps) * t + eps
    return p, 1 / p


def cosine(t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """p = (1-eps) (1 - cos(pi t / 2)) + eps, weight p'/p: more time at little noise (MaskGIT, arXiv 2202.04200)."""
    p = (1 - eps) * (1 - torch.cos(t * math.pi / 2)) + eps
    return p, (1 - eps) * torch.sin(t * math.pi / 2) * (math.pi / 2) / p


Schedule = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (t, eps) -> (p(t), p'(t) / p(t))
SCHEDULES: dict[str, Schedule] = {"linear": linear, "log_linear": linear, "cosine": cosine}


def schedule_of(name: str | Schedule) -> Schedule:
    """A schedule by its name, here or, as "package.module.name", in a module of one's own.

    Raises:
        ValueError: there is none of that name.
    """
    return function_of("schedule", name, SCHEDULES)


def revealed(schedule: str | Schedule, step: Tensor, steps: int) -> Tensor:
    """The share of slots that is shown, 0 to 1, when `step` of `steps` equal steps from t = 1 to 0 are done: 1 - p.

    Raises:
        ValueError: it is neither a function nor one of `SCHEDULES`. A checkpoint may name one, so nothing is imported.
    """
    known = SCHEDULES.get(schedule) if isinstance(schedule, str) else schedule
    found = known(1 - step.double() / steps, 0.0) if callable(known) else None
    if not isinstance(found, tuple):
        names = ", ".join(map(repr, SCHEDULES))
        raise ValueError(f"noise_schedule is {schedule!r}; use one of {names}, or a function of t and eps as they are.")
    return 1 - found[0]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How the noisy view is made.

    Attributes:
        block_sizes: sizes of noisy blocks, one drawn per sequence; empty: the model's `block_size`.
        offset: where blocks begin: "random" per sequence, as decoding does; "grid", at multiples of the size
            (BD3-LM); "prompt", counted from the first target, as decoding a response does.
        seed_clean: slot 0 of each block is shown and not in the loss, as when decoding: the left-to-right model
            has predicted it. None: where the model has such seeds.
        seedless_prob: share of blocks of which slot 0 can be masked in spite of `seed_clean`: speculation opens them
            behind a clean seed, before the next token is known.
        draft_prob: share of blocks whose slots are all masked, as in the first draft of a window.
        canvas_prob: share of sequences with one noisy block from a random position (with offset="prompt", the first
            target) to the end, as `diffusion` mode opens it.
        t_per: one time per "block" (BD3-LM) or per "sequence" (LLaDA).
        antithetic: times are spread evenly over consecutive samples and blocks, not drawn independently
            (arXiv 2107.00630, appendix I.1).
        t_range: times are drawn from this range; BD3-LM clips it to cut the variance (section 5.2 there), and
            `hybrid train clip` looks for the best. What is left is no bound of the likelihood.
        schedule: "linear", "cosine", or "log_linear", MDLM's name for "linear"; or a function of one's own, (t, eps) ->
            (p(t), p'(t) / p(t)), itself or as "package.module.name".
        eps: the least masking probability.
        complementary: a second noisy view masks what the first one shows, so that each token is learned exactly
            once from the two, all with weight 1 (Fast-dLLM v2, arXiv 2509.26328). It is a third stream
            beside the same clean text. High noise counts for more than in the bound.
    """

    block_sizes: tuple[int, ...] = ()
    offset: Literal["random", "grid", "prompt"] = "random"
    seed_clean: bool | None = None
    seedless_prob: float = 0.0
    draft_prob: float = 0.0
    canvas_prob: float = 0.2
    t_per: Literal["block", "sequence"] = "block"
    antithetic: bool = True
    t_range: tuple[float, float] = (0.0, 1.0)
    schedule: str | Schedule = "linear"
    eps: float = 1e-3
    complementary: bool = False

    def check(self, config: HybridConfig, length: int) -> None:
        """Raise ValueError for settings that do not go with each other, the model, or sequences of `length`."""

        for name in ("seedless_prob", "draft_prob", "canvas_prob"):
            require(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; it is a probability.")
        low, high = self.t_range
        require(0 <= low < high <= 1, f"t_range is {self.t_range}; it needs 0 <= low < high <= 1.")
        require(0 < self.eps < 1, f"eps is {self.eps}; it must lie between 0 and 1.")
        schedule_of(self.schedule)
        check_choices(self)
        sizes = self.block_sizes or (config.block_size,)
        require(
            all(1 <= size <= length for size in sizes),
            f"block_sizes is {sizes}; each must lie between 1 and the sequence length, {length}.",
        )
        law, seeds = Law.of(config), seed_clean(self, config)
        require(
            not seeds or any(size > 1 for size in sizes) or self.canvas_prob > 0 or self.seedless_prob > 0,
            f"block_sizes is {sizes}: with seed_clean nothing of a block of one is ever masked; use larger blocks.",
        )
        if law.grid is not None:
            require(
                self.offset == "grid" and set(sizes) == {law.grid} and self.canvas_prob == 0,
                f"clean_attention='block' sees clean text on a grid of {law.grid}: use offset='grid', that one block "
                "size and canvas_prob=0.",
            )
        require(
            not seeds or law.follows,
            f"seed_clean needs a model that predicts the token after clean text; this one has clean_attention="
            f"{law.clean_attention!r} and in-place predictions. Leave it out.",
        )
        require(
            self.seedless_prob == 0 or seeds,
            f"seedless_prob is {self.seedless_prob}, and no block has a clean slot 0 (seed_clean): leave it out.",
        )


def seed_clean(noise: Noise, config: HybridConfig) -> bool:
    """Whether slot 0 of each noisy block stays clean."""
    return Law.of(config).exact if noise.seed_clean is None else noise.seed_clean


@dataclass(frozen=True)
class Noised:
    """The noisy view of a batch, from position `begin` on: blocks before the first target teach nothing.

    Attributes:
        begin: the first position that is in the view; the tensors below have T - begin columns, or twice as many with
            complementary masks, one view behind the other.
        tokens: int64, the mask token in masked slots.
        layout: its labels, in stream 1, and 2 in the complementary view. `layout.position` is where a column stands.
        masked: bool.
        weight: float32, a masked slot's weight in the loss; 0 elsewhere.
        t: float32, each slot's time; in the complementary view 1 - t.
    """

    begin: int
    tokens: Tensor
    layout: Layout
    masked: Tensor
    weight: Tensor
    t: Tensor


def corrupt(
    ids: Tensor, target: Tensor, doc: Tensor, index: Tensor, noise: Noise, config: HybridConfig, seed: int
) -> Noised:
    """The noisy view of `ids`, int64 `[B, T]`.

    Args:
        target: bool `[B, T]`, the tokens to be learned; only they are ever masked.
        doc: int64 `[B, T]`, packed documents; -1 for padding.
        index: int64 `[B]`, the number of each sample in the whole training stream.
    """
    law, (batch, length) = Law.of(config), ids.shape
    assert config.mask_token_id is not None, "a pure AR model has no noise"
    # Position by position, so that padding behind a row, of which another batch has more, changes none of its draws.
    draws = uniform(seed, index, 4 + 3 * length)
    u_mask, u_draft, u_time = draws[:, 4:].view(batch, length, 3).unbind(2)
    prompt = target.long().argmax(1, keepdim=True)
    starts = _starts(draws[:, :4, None], prompt, doc, noise, config) if law.cached else torch.zeros_like(doc)

    # Everything of a block is drawn at its first position, so that its slots share it.
    t = _times(u_time, starts if noise.t_per == "block" else torch.zeros_like(starts), index, noise, seed)
    p, weight = schedule_of(noise.schedule)(t, noise.eps)
    draft = u_draft.gather(1, starts) < noise.draft_prob
    p, weight, t = (torch.where(draft, 1.0, x) for x in (p, weight, t))
    learned = target & (doc >= 0)
    if seed_clean(noise, config):
        hidden = uniform(-1 - seed, index, length).gather(1, starts) < noise.seedless_prob
        learned &= (torch.arange(length, device=ids.device) != starts) | hidden
    masked = (u_mask < p) & learned
    begin = int(starts.gather(1, prompt).min())
    layout = law.noisy(starts, doc)
    if noise.complementary:
        ids, weight = torch.cat([ids, ids], 1), torch.ones_like(torch.cat([p, p], 1))
        masked, t = torch.cat([masked, learned & ~masked], 1), torch.cat([t, 1 - t], 1)
        layout = layout.cat(law.noisy(starts, doc, stream=2))
    shown = layout.position[0] >= begin
    return Noised(
        begin=begin,
        tokens=ids.masked_fill(masked, config.mask_token_id)[:, shown],
        layout=Layout(layout.labels[..., shown]),
        masked=masked[:, shown],
        weight=(weight * masked)[:, shown],
        t=t[:, shown],
    )


def _starts(draws: Tensor, prompt: Tensor, doc: Tensor, noise: Noise, config: HybridConfig) -> Tensor:
    """int64 `[B, T]`: where the noisy block of each position begins.

    Args:
        draws: `[B, 4, 1]`.
        prompt: int64 `[B, 1]`, the first target.
    """
    u_size, u_offset, u_canvas, u_begin = draws.unbind(1)
    position = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
    sizes = torch.tensor(noise.block_sizes or (config.block_size,), device=doc.device)
    size = sizes[(u_size * len(sizes)).long()]
    offset = {"random": (u_offset * size).long(), "grid": 0 * prompt, "prompt": prompt}[noise.offset]
    starts = ((position - offset).div(size, rounding_mode="floor") * size + offset).clamp(min=0)
    end = ((doc >= 0) * (position + 1)).amax(1, keepdim=True)
    canvas = prompt if noise.offset == "prompt" else (u_begin * end).long()
    return torch.where((u_canvas < noise.canvas_prob) & (position >= canvas), canvas, starts)


def _times(draws: Tensor, own: Tensor, index: Tensor, noise: Noise, seed: int) -> Tensor:
    """float32 `[B, T]`: the time of each position, which is that drawn at the position `own`."""
    if noise.antithetic:
        first = uniform(seed, torch.zeros_like(index[:1]) - 1, 1)
        time = (first + index[:, None].double() * ROW_STEP + own.double() * BLOCK_STEP) % 1.0
    else:
        time = draws.gather(1, own)
    low, high = noise.t_range
    return (low + (high - low) * time).float()


def uniform(seed: int, index: Tensor, count: int) -> Tensor:
    """float64 `[B, count]` in [0, 1): row b depends on `seed` and `index[b]` alone."""
    rows = [torch.rand(count, generator=source_of(seed, i), dtype=torch.float64) for i in index.tolist()]
    return torch.stack(rows).to(index.device)


def source_of(*numbers: int) -> torch.Generator:
    """The source of all draws of what has these numbers, such as a seed and a place in a stream: others have others."""
    key = hashlib.blake2b(":".join(map(str, numbers)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
