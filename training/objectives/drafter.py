"""Training a drafter: an adapter on noisy streams, or a head on clean rows, that guesses what a frozen model will say.

The model's weights are never touched, and clean text never feels the adapter, so left to right the model says what it
always said, bit for bit; `mode="speculative"` is lossless, and the better the drafts, the fewer forwards it takes.

What is clean depends on nothing that is learned. So its keys and values are computed once, without gradients, by the
forward that also gives the verifier's word on every slot, and only the noisy windows, each as decoding opens it,
[MASK, ...] behind a clean seed, go forward and back. The first slot stands for the token that the seed itself says, and
is not learned. A head reads clean rows alone: each place of the text is a window, and nothing but the head goes back.

Shapes: B rows, T tokens, N drafted slots, S windows, K drafts of each, V vocabulary.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybrid import HybridConfig, HybridForCausalLM, KVCache, Layout
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.adapters.draft_head import RANK, DraftHead
from hybrid.common.checks import check_choices, require
from hybrid.law import Law
from hybrid.noise import Noise, corrupt
from hybrid.training.batch import Batch, check_batch
from hybrid.training.component import Component, Losses, Part, by_offset, wide
from hybrid.training.running.precision import best_precision

CHUNK = 128  # slots whose logits are in memory at once; small enough that malloc keeps the memory


@dataclass(frozen=True, kw_only=True)
class Drafter(Component):
    """What is learned, and how drafts are judged.

    Attributes:
        rank, alpha, targets: of the adapter, see `DraftAdapter`.
        head_size, words, head_rank: of a head that guesses ahead (`DraftHead`), which is then what is trained, without
            an adapter: `targets` must be (). `words`: how many tokens it can guess at, the first ones, or a file with a
            JSON list of their ids; None: all. `head_rank`: of its output, which is learned, or with the model's hidden
            size is the model's own.
        seedless_prob: share of windows that open behind their seed, as `mode="speculative"` does; in the others the
            seed is slot 0, as where `drafts_per_round` is above 1.
        block_sizes: windows, one size drawn per sequence; empty: the model's `block_size`.
        kind: of loss. "ce" is cross-entropy to the verifier's likeliest token. "lk" adds lambda KL + (1 - lambda) TV
            between verifier p and drafter q, lambda = exp(-eta a), where a = sum min(p, q) is the rate at which drafts
            would be accepted, taken as a constant (LK losses, arXiv 2602.23881; Nemotron-Labs-Diffusion, arXiv
            2607.05722): KL while drafts are poor, then the rate itself.
        eta, temperature, top: of "lk"; both laws are softened by `temperature` and taken over the union of the `top`
            likeliest tokens of each (0: over all).
        ce_weight: of the cross-entropy beside "lk".
        slots: "all" slots count alike; "reached" weighs each by the chance that verification gets to it, which is what
            averaging over accepted and first rejected drafts comes to. Exact where the text was sampled from the
            verifier (for the `sampled` part) or is its greedy text (for the rest).
        sampled: with "reached", the share of drafts that are sampled at temperature 1; the rest are the likeliest.
        dtype: of the frozen model while training: "auto" is bfloat16 where the hardware multiplies it.
        save_dtype: of the adapter's file.
    """

    keeps_model: ClassVar[bool] = True
    whole_model: ClassVar[str] = "a drafter is small and is trained undivided"

    rank: int = 24
    alpha: float = 48.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    head_size: int | None = None
    words: int | str | None = None
    head_rank: int = RANK
    seedless_prob: float = 1.0
    block_sizes: tuple[int, ...] = ()
    kind: Literal["ce", "lk"] = "lk"
    eta: float = 0.5
    temperature: float = 3.0
    top: int = 200
    ce_weight: float = 1.0
    slots: Literal["all", "reached"] = "all"
    sampled: float = 0.9
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @property
    def noise(self) -> Noise:
        """Every window as its first draft sees it."""
        return Noise(
            block_sizes=self.block_sizes, draft_prob=1.0, canvas_prob=0.0, seedless_prob=self.seedless_prob
        )  # fmt: skip

    def check(self, config: HybridConfig, length: int) -> None:
        """Raise ValueError for settings that do not go with the model or with sequences of `length` tokens."""
        require(config.is_hybrid, "drafter: the model has no mask token: make a hybrid of it with `hybrid convert`.")
        require(
            Law.of(config).exact,
            f"drafter: drafts are verified left to right, and clean_attention is {config.clean_attention!r}.",
        )
        require(
            self.head_size is None or not self.targets,
            "head_size: a head reads clean text, which no adapter changes: train one of them (the head: targets ()).",
        )
        check_choices(self)
        require(self.eta >= 0, f"eta is {self.eta}; it must not be negative.")
        require(self.temperature > 0, f"temperature is {self.temperature}; it must be above 0.")
        require(self.top >= 0, f"top is {self.top}; it is a number of tokens, or 0 for all.")
        require(self.ce_weight >= 0, f"ce_weight is {self.ce_weight}; it must not be negative.")
        require(0 <= self.sampled <= 1, f"sampled is {self.sampled}; it is a share, 0 to 1.")
        require(
            min(self.block_sizes or (config.block_size,)) >= 2,
            f"block_sizes is {self.block_sizes or (config.block_size,)}: a window of one has no draft; use 2 or more.",
        )
        self.noise.check(config, length)

    def attach(self, model: HybridForCausalLM, seed: int) -> DraftAdapter:
        """A fresh adapter for `model`, which is frozen and takes the number format it is trained beside."""
        model.requires_grad_(False)
        narrow = self.dtype == "bfloat16" or (self.dtype == "auto" and best_precision() == "bf16-mixed")
        model.to(torch.bfloat16 if narrow else torch.float32)
        source = torch.Generator().manual_seed(seed)
        return DraftAdapter(
            model, self.rank, self.alpha, self.targets, generator=source, dtype=torch.float32,
            head_size=self.head_size, words=self._words, head_rank=self.head_rank,
        )  # fmt: skip

    @property
    def _words(self) -> int | list[int] | None:
        if not isinstance(self.words, str):
            return self.words
        try:
            found = json.loads(Path(self.words).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"words: {self.words} is no file with a JSON list of token ids ({error}).") from error
        return list(map(int, found))

    def loss(
        self, model: HybridForCausalLM, batch: Batch, seed: int, progress: float = 1.0, beside: Any = None
    ) -> Losses:  # fmt: skip
        return drafter_losses(model, beside, batch, self, seed)

    def artifact(self, model: HybridForCausalLM, beside: Any) -> DraftAdapter:
        """The adapter, in the number format of its file."""
        return copy.deepcopy(beside).to(getattr(torch, self.save_dtype))


class Behind(KVCache):
    """Clean text that new tokens see and do not change: nothing is written, so gradients flow through what is new."""

    def __init__(self, clean: KVCache) -> None:
        self.keys, self.values, self.labels = clean.keys, clean.values, clean.labels

    @property
    def even(self) -> bool:
        return False  # windows stand between clean tokens, not behind them

    def open(self, layout: Layout, ids: Tensor) -> Layout:
        return Layout(self.labels).cat(layout)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys[layer], key], 2), torch.cat([self.values[layer], value], 2)


def drafter_losses(
    model: HybridForCausalLM, adapter: DraftAdapter, batch: Batch, drafter: Drafter, seed: int
) -> Losses:
    """The loss of one batch; only the adapter gets gradients.

    "diffusion" is the mean over slots, "masked_accuracy" how often a draft is the verifier's likeliest token,
    "draft_accuracy_k" that of the k-th draft behind what is known, and "kept" the tokens that a round of greedy
    speculation would keep, were its text the batch's.
    """
    check_batch(batch, model.config)
    if adapter.head is not None:
        return _head_losses(model, adapter.head, batch, drafter)
    ids, doc, config, law = batch["input_ids"], batch["doc"], model.config, Law.of(model.config)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with torch.no_grad():
        cache = KVCache(config, len(ids), ids.shape[1], ids.device, model.dtype)
        verifier = model.model.states(ids, law.clean_rows(doc), cache)
    noised = corrupt(ids, torch.ones_like(ids, dtype=torch.bool), doc, batch["index"], drafter.noise, config, seed)
    drafts = model.model.states(noised.tokens, noised.layout, Behind(cache), adapter)

    drafts, starts = law.predictions(drafts, noised.layout), noised.layout.block
    # A window ends with its document: behind that it has no seed.
    drafted = noised.masked & (doc == doc.gather(1, starts)) & (place > starts)
    before = verifier.roll(1, 1)  # the verifier's word on a slot is read off the token before it
    slot_loss, agrees, log_ratio = _judged(model, drafter, before[drafted], drafts[drafted], ids[drafted])

    reached, wrong = (_before(values, drafted, starts) for values in (log_ratio, (~agrees).double()))
    return _figures(
        drafter, slot_loss, agrees, batch["target"][drafted], reached.exp().float(), (wrong == 0).float(),
        (place - starts)[drafted], _drafts(drafter, config), known=1 + drafter.seedless_prob,
    )  # fmt: skip


def _head_losses(model: HybridForCausalLM, head: DraftHead, batch: Batch, drafter: Drafter) -> Losses:
    """The same figures of a head. Row s says token s + 1, so the head's k-th draft is for slot s + 1 + k, read behind
    the token before that, whose row is the verifier's word."""
    ids, doc, law = batch["input_ids"], batch["doc"], Law.of(model.config)
    length, count = ids.shape[1], _drafts(drafter, model.config)
    place = torch.arange(length, device=ids.device).expand_as(ids)
    with torch.no_grad():
        verifier = model.model.states(ids, law.clean_rows(doc))
        best = torch.cat([law.without_mask(model.lm_head(x)).argmax(-1) for x in verifier.flatten(0, 1).split(CHUNK)])
    best = best.view_as(ids)

    # `[B, T, K]`: the slots of each window, and whether they are its text's.
    slot = place[..., None] + torch.arange(2, count + 2, device=ids.device)
    inside, slot = slot < length, slot.clamp(max=length - 1)
    row = torch.arange(len(ids), device=ids.device)[:, None, None]
    learned = inside & batch["target"][row, slot] & (doc[row, slot] == doc[..., None]) & (doc >= 0)[..., None]
    at = learned.any(-1).nonzero()
    embed, dtype, words = model.model.embed_tokens, head.say.dtype, head.ids
    known = torch.full((model.config.vocab_size,), -1, device=ids.device)
    known[words] = torch.arange(len(words), device=ids.device)

    def chunk(at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, slots = at[:, :1], slot[at[:, 0], at[:, 1]]
        said = ids[rows, slots - 1]
        q = head.over_text(verifier[at[:, 0], at[:, 1]].to(dtype), embed(said).to(dtype)).float()
        want = known[best[rows, slots - 1]]
        p = F.linear(verifier[rows, slots - 1], model.lm_head.weight[words]).float()
        loss = _slot_loss(drafter, p.flatten(0, 1), q.flatten(0, 1), want.clamp(min=0).flatten()).view_as(want)
        with torch.no_grad():
            text = known[ids[rows, slots]].clamp(min=0)[..., None]
            log_p, log_q = (x.gather(-1, text)[..., 0] - x.logsumexp(-1) for x in (p, q))
            return loss, q.argmax(-1) == want, (log_q - log_p).clamp(max=0), want >= 0

    parts = [checkpoint(chunk, some, use_reentrant=False) for some in at.split(max(1, CHUNK // count))]
    loss, agrees, log_ratio, sayable = (torch.cat(x) for x in zip(*parts, strict=True))
    learned = learned[at[:, 0], at[:, 1]]
    sure = torch.cat([torch.ones_like(loss[:, :1]), agrees[:, :-1].cumprod(1)], 1)
    reached = (log_ratio.double().cumsum(1) - log_ratio).exp().float()
    offset = torch.arange(1, count + 1, device=ids.device).expand_as(learned)
    return _figures(drafter, loss, agrees, learned, reached, sure, offset, count, known=1, sayable=sayable)


def _drafts(drafter: Drafter, config: HybridConfig) -> int:
    """Of the widest window, the first slot of which is known or not learned."""
    return max(drafter.block_sizes or (config.block_size,)) - 1


def _before(values: Tensor, drafted: Tensor, starts: Tensor) -> Tensor:
    """float64 `[N]`: for each drafted slot, the sum of `values` `[N]` over the earlier slots of its window."""
    grid = torch.zeros(drafted.shape, dtype=torch.float64, device=drafted.device)
    grid[drafted] = values.double()
    before = grid.cumsum(1) - grid
    return (before - before.gather(1, starts))[drafted]


def _slot_loss(drafter: Drafter, verifier: Tensor, drafts: Tensor, best: Tensor) -> Tensor:
    """The loss of each of N slots, `[N]`, from the logits `[N, V]` of both and the verifier's likeliest token."""
    loss = F.cross_entropy(drafts, best, reduction="none")
    if drafter.kind == "ce":
        return loss
    return drafter.ce_weight * loss + lk_loss(verifier, drafts, drafter.eta, drafter.temperature, drafter.top)


def _figures(
    drafter: Drafter, loss: Tensor, agrees: Tensor, learned: Tensor, reached: Tensor, sure: Tensor, offset: Tensor,
    most: int, known: float, sayable: Tensor | None = None,
) -> Losses:  # fmt: skip
    """What slots say together, of any shape, all alike.

    Args:
        loss: of each slot.
        agrees: whether the likeliest draft is the verifier's likeliest token.
        learned: whether the slot counts.
        reached: the chance that verification gets to it, where drafts are sampled; `sure`: where they are greedy.
        offset: which draft of its window it is, from 1 to `most`.
        known: tokens of a round that are no drafts.
        sayable: whether the drafter has the verifier's token at all; others are not learned.
    """
    weight = (learned if sayable is None else learned & sayable).to(loss.dtype)
    if drafter.slots == "reached":
        weight = weight * (drafter.sampled * reached + (1 - drafter.sampled) * sure)
    rounds = (learned & (offset == 1)).sum()
    right, counted, offset = agrees.flatten(), learned.flatten(), offset.flatten()
    return Losses(parts={
        "diffusion": Part((weight * loss).sum(), wide(weight).sum(), 1.0),
        "masked_accuracy": Part(agrees[learned].sum().to(loss.dtype), learned.sum()),
        "kept": Part(known * rounds + (sure * agrees * learned).sum(), rounds),
        **by_offset(right, counted, offset, most),
    })  # fmt: skip


def _judged(
    model: HybridForCausalLM, drafter: Drafter, verifier: Tensor, drafts: Tensor, text: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For each of N slots, from the two hidden states `[N, C]` and the token of the text there: its loss, whether the
    likeliest draft is the verifier's, and log min(1, q/p) of the text's token."""
    law = Law.of(model.config)

    def chunk(verifier: Tensor, drafts: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, q = (law.without_mask(model.lm_head(x)).float() for x in (verifier, drafts))
        best = p.argmax(-1)
        loss = _slot_loss(drafter, p, q, best)
        with torch.no_grad():
            said = [x.gather(1, text[:, None])[:, 0] - x.logsumexp(-1) for x in (p, q)]
            return loss, q.argmax(-1) == best, (said[1] - said[0]).clamp(max=0)

    parts = [
        # Logits are made again for the backward pass: kept, they would be most of the memory.
        checkpoint(chunk, *some, use_reentrant=False)
        for some in zip(verifier.split(CHUNK), drafts.split(CHUNK), text.split(CHUNK), strict=True)
    ]
    loss, agrees, log_ratio = (torch.cat(x) for x in zip(*parts, strict=True))
    return loss, agrees, log_ratio


def lk_loss(verifier: Tensor, drafter: Tensor, eta: float = 0.5, temperature: float = 3.0, top: int = 200) -> Tensor:
    """lambda KL(p || q) + (1 - lambda) TV(p, q) of each slot, `[N]`, with lambda = exp(-eta sum min(p, q)) held
    constant (arXiv 2602.23881; at temperature 3 on the union of the top 200, arXiv 2607.05722).

    Args:
        verifier, drafter: logits `[N, V]`; p and q are their softmax at `temperature` over the union of the `top`
            likeliest tokens of each (0: all tokens). Only `drafter` gets gradients.
    """
    p, q = verifier.detach() / temperature, drafter / temperature
    if 0 < top < p.shape[-1]:
        # The union as a list: the verifier's tokens, then the drafter's, of which those that came before are blanked.
        index = torch.cat([p.topk(top).indices, q.detach().topk(top).indices], -1)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(1, index[:, :top], True)
        again = torch.zeros_like(index, dtype=torch.bool)
        again[:, top:] = chosen.gather(1, index[:, top:])
        p, q = (x.gather(1, index).masked_fill(again, -torch.inf) for x in (p, q))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    # 0 log 0 = 0: tokens that neither may say, like the mask.
    kl = (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)
    overlap = torch.minimum(p, q).sum(-1)
    share = torch.exp(-eta * overlap.detach())
    return share * kl + (1 - share) * (1 - overlap)
