"""The training loss: left to right on the clean view, masked slots on the noisy one, in one forward.

    L = ar_weight * L_ar + diffusion_weight * L_diff     on the input [x_0 ; x_t]

(Nemotron-Labs-Diffusion, arXiv 2607.05722; the two-stream input is BD3-LM's, arXiv 2503.09573.) Settings of the
same code: pure AR (`diffusion_weight=0`), block diffusion (`ar_weight=0`), and pure masked diffusion (a
`clean_attention="full"` model, which has no clean view). With complementary masks there are two noisy views.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.common.checks import check_choices, require
from hybrid.law import Law
from hybrid.noise import Noise, Noised, corrupt
from hybrid.training.batch import Batch, as_batch, check_batch
from hybrid.training.component import Component, Losses, Part, by_offset, wide
from hybrid.training.objectives.cross_entropy import cross_entropy
from hybrid.training.objectives.curriculum import Curriculum


@dataclass(frozen=True, kw_only=True)
class Objective(Component):
    """What is learned.

    Attributes:
        ar_weight, diffusion_weight: the parts of the loss (1 and 0.3 are Nemotron-Labs-Diffusion's optimum).
        denominator: "per_token" divides the weighted sum at masked slots by the number of targets, which makes it
            a bound in nats a token (LLaDA, BD3-LM); "pooled" by the sum of the weights, which has less variance.
        noise: how the noisy view is made.
        ar_first: share of the job that learns left to right only, before both are learned (the two stages of
            Nemotron-Labs-Diffusion).
        curriculum: block sizes that change in the course of the rest of the job, instead of `noise.block_sizes`.
        z_loss: adds this times the mean of log(Z)^2, Z the sum of the exponentials that a softmax divides by, over
            all the softmaxes of the step; it keeps logits from drifting (PaLM, arXiv 2204.02311, section 5: 1e-4).
        eos_padding_weight: EOS tokens that follow an EOS are padding, which a model must know to end a text inside a
            window; each run of it counts, all together, as this many tokens (at most one each), so that it cannot
            dominate, however long it is. None: one each (LLaDA, arXiv 2502.09992, section 2.3), which teaches models
            to end early (arXiv 2510.03680).
    """

    ar_weight: float = 1.0
    diffusion_weight: float = 0.3
    denominator: Literal["per_token", "pooled"] = "per_token"
    noise: Noise = field(default_factory=Noise)
    ar_first: float = 0.0
    curriculum: Curriculum | None = None
    z_loss: float = 0.0
    eos_padding_weight: float | None = 1.0

    def at(self, progress: float) -> "Objective":
        """What is learned when `progress` (0 to 1) of the job is done: the same without stages."""
        if self.ar_first == 0 and self.curriculum is None:
            return self
        joint = progress >= self.ar_first
        noise = self.noise
        if self.curriculum is not None and joint:
            size = self.curriculum.size((progress - self.ar_first) / (1 - self.ar_first))
            noise = replace(noise, block_sizes=(size,))
        weight = self.diffusion_weight if joint else 0.0
        return replace(self, diffusion_weight=weight, noise=noise, ar_first=0.0, curriculum=None)

    def check(self, config: HybridConfig, length: int) -> None:
        """Raise ValueError for settings that do not go with the model or with sequences of `length` tokens."""
        self.check_model(config)
        if self.ar_weight < 0 or self.diffusion_weight < 0 or self.ar_weight + self.diffusion_weight == 0:
            raise ValueError("ar_weight and diffusion_weight must not be negative, and one must be above 0.")
        if not 0 <= self.ar_first < 1:
            raise ValueError(f"ar_first is {self.ar_first}; it is the share of the job's first stage, below 1.")
        if self.ar_first > 0 and min(self.ar_weight, self.diffusion_weight) == 0:
            raise ValueError(f"ar_first is {self.ar_first}: two stages need both weights above 0.")
        require(self.z_loss >= 0, f"z_loss is {self.z_loss}; it must not be negative (1e-4 is usual).")
        if self.eos_padding_weight is not None and self.eos_padding_weight < 0:
            raise ValueError(f"eos_padding_weight is {self.eos_padding_weight}; it must not be negative, or None.")
        if self.curriculum is not None:
            self._check_curriculum(self.curriculum, config, length)
        if self.diffusion_weight > 0:
            self.at(1.0).noise.check(config, length)

    def check_model(self, config: HybridConfig) -> None:
        """Raise ValueError for what no model of this kind can learn, at any stage."""
        check_choices(self)
        check_choices(self.noise)
        if self.ar_weight > 0 and not Law.of(config).exact:
            raise ValueError(
                f"ar_weight is {self.ar_weight}, and clean_attention={config.clean_attention!r} shows a token what it "
                "should predict: set ar_weight=0, or clean_attention='causal'."
            )
        if self.diffusion_weight > 0 and not config.is_hybrid:
            raise ValueError("diffusion_weight is above 0, and the model has no mask_token_id: set one of them.")

    def _check_curriculum(self, curriculum: Curriculum, config: HybridConfig, length: int) -> None:
        curriculum.check(length)
        require(self.diffusion_weight > 0, "curriculum: with diffusion_weight=0 there are no blocks; leave it out.")
        if self.noise.block_sizes:
            raise ValueError("curriculum and noise.block_sizes both say how long blocks are: give one of them.")
        if not Law.of(config).cached:
            raise ValueError("curriculum: a clean_attention='full' model has one block, the whole row; leave it out.")

    def loss(
        self, model: HybridForCausalLM, batch: Batch, seed: int, progress: float = 1.0, beside: Any = None
    ) -> Losses:  # fmt: skip
        return losses(model, batch, self.at(progress), seed)

    def counts(
        self, model: HybridForCausalLM, batch: Batch, seed: int, progress: float = 1.0, beside: Any = None
    ) -> dict[str, Tensor]:  # fmt: skip
        return _planned(batch, self.at(progress), model.config, seed).counts

    def figures(self, means: dict[str, float], bits: float | None) -> dict[str, float]:
        # A bound where L_diff is a mean over targets; pooled, it is none.
        nats = ("ar", "diffusion") if self.denominator == "per_token" else ("ar",)
        known = () if bits is None else [name for name in nats if name in means]
        return means | {f"{name}_bits_per_byte": means[name] * bits for name in known if bits is not None}


@dataclass(frozen=True)
class _Plan:
    """What of a batch is learned, known before the model is asked.

    Attributes:
        noised: the noisy view, where there is one.
        follows: bool `[B, T - 1]`, whether the token behind each one is learned left to right.
        share: float32 `[B, T]`, what each token counts; None where each counts 1.
        weight: `[n]`, of the masked slots.
        counts: what the parts are divided by.
    """

    noised: Noised | None
    follows: Tensor
    share: Tensor | None
    weight: Tensor | None
    counts: dict[str, Tensor]


def _planned(batch: Batch, objective: Objective, config: HybridConfig, seed: int) -> _Plan:
    ids, target, doc = batch["input_ids"], batch["target"], batch["doc"]
    share = _padding_weight(ids, target, doc, config, objective.eos_padding_weight)
    follows = target[:, 1:] & (doc[:, 1:] == doc[:, :-1])
    noised, weight, counts = None, None, {}
    softmaxes = torch.zeros((), dtype=torch.int64, device=ids.device)
    if objective.ar_weight > 0:
        counts["ar"] = follows.sum() if share is None else wide(share[:, 1:][follows]).sum()
        softmaxes = softmaxes + follows.sum()
    if objective.diffusion_weight > 0:
        noised = corrupt(ids, target, doc, batch["index"], objective.noise, config, seed)
        weight, count = noised.weight[noised.masked], target.sum()
        if share is not None:
            weight = weight * share.gather(1, noised.layout.position)[noised.masked]
            count = wide(share * target).sum()
        counts["diffusion"] = count if objective.denominator == "per_token" else wide(weight).sum()
        softmaxes = softmaxes + noised.masked.sum()
    if objective.z_loss > 0:
        counts["z"] = softmaxes
    return _Plan(noised, follows, share, weight, counts)


def losses(
    model: HybridForCausalLM, batch: Batch | Mapping[str, Any] | Tensor, objective: Objective | None = None,
    seed: int = 0,
) -> Losses:  # fmt: skip
    """The loss of one batch, for loops of one's own too: `losses(model, batch).total.backward()`. Logits are computed
    only where they are read.

    Args:
        batch: whatever `as_batch` takes; token ids alone will do, int64 `[B, T]`.
        objective: None is the joint one with its defaults. Stages and a curriculum belong to a job: see
            `Objective.at`.
        seed: of the noise, together with the batch's `index`: where that is left out, give every step another seed.

    Raises:
        TypeError: `model` is no hybrid, or a tensor has another type than it should.
        ValueError: the objective does not go with the model, or the batch with either.
    """
    if not isinstance(getattr(model, "config", None), HybridConfig):
        raise TypeError(f"model is a {type(model).__name__}, and no HybridForCausalLM; `hybrid convert` makes one.")
    objective, batch = objective or Objective(), as_batch(batch)
    check_batch(batch, model.config)
    objective.check_model(model.config)
    plan = _planned(batch, objective, model.config, seed)
    ids, doc, noised, sizes = batch["input_ids"], batch["doc"], plan.noised, objective.noise.block_sizes
    clean: Tensor | None
    noisy: Tensor | None = None
    if noised is None:
        clean = model.model.states(ids, Law.of(model.config).clean_rows(doc))
    else:
        # A block-causal model's clean text has the blocks of its noisy one, which a curriculum changes.
        clean, noisy = model.model.views(ids, doc, noised.tokens, noised.layout, sizes[0] if sizes else None)
    parts: dict[str, Part] = {}
    found, log_z = Losses(), []
    if objective.ar_weight > 0:
        assert clean is not None
        parts["ar"], z = _following(model, ids, clean, plan, objective)
        log_z.append(z)
    if noisy is not None:
        found, z = _masked(model, ids, noisy, plan, objective)
        log_z.append(z)
    parts |= found.parts
    if objective.z_loss > 0:
        parts["z"] = Part((torch.cat(log_z) ** 2).sum(), plan.counts["z"], objective.z_loss)
    slots = sum(x.shape[:2].numel() for x in (clean, noisy) if x is not None)
    return replace(found, parts=parts, slots=slots, logits=sum(map(len, log_z)))


def _following(
    model: HybridForCausalLM, ids: Tensor, clean: Tensor, plan: _Plan, objective: Objective
) -> tuple[Part, Tensor]:
    """What clean text says of the token behind each one, and log Z of each row of logits."""
    follows = plan.follows
    logits = model.lm_head(clean[:, :-1][follows])
    nll, log_z, _ = cross_entropy(logits, ids[:, 1:][follows], model.config.mask_token_id)
    total = nll.sum() if plan.share is None else (nll * plan.share[:, 1:][follows]).sum()
    return Part(total, plan.counts["ar"], objective.ar_weight), log_z


def _masked(
    model: HybridForCausalLM, ids: Tensor, noisy: Tensor, plan: _Plan, objective: Objective
) -> tuple[Losses, Tensor]:
    """What the masked slots say, and log Z of each row of logits."""
    noised, config = plan.noised, model.config
    assert noised is not None and plan.weight is not None
    masked, layout, t = noised.masked, noised.layout, noised.t[noised.masked]
    logits = model.lm_head(Law.of(config).predictions(noisy, layout)[masked])
    wanted = ids.gather(1, layout.position)[masked]
    nll, log_z, best = cross_entropy(logits, wanted, config.mask_token_id)
    right = best == wanted
    # Of the first drafts of windows, those behind each other are told apart. A time of 1 hides all of a block, as
    # decoding first sees it.
    most = max(objective.noise.block_sizes or (config.block_size,)) - 1 if objective.noise.draft_prob else 0
    parts = {
        "diffusion": Part((plan.weight * nll).sum(), plan.counts["diffusion"], objective.diffusion_weight),
        "masked_accuracy": Part(right.sum().to(nll.dtype), masked.sum()),
        **by_offset(right, t == 1, (layout.position - layout.block)[masked], most),
    }
    return Losses(parts=parts, masked_nll=nll.detach(), masked_t=t, masked_right=right), log_z


def _padding_weight(
    ids: Tensor, target: Tensor, doc: Tensor, config: HybridConfig, together: float | None
) -> Tensor | None:
    """float32 `[B, T]`: what each token counts, see `Objective.eos_padding_weight`; None where each counts 1."""
    if together is None or config.eos_token_id is None:
        return None
    ends = torch.tensor(config.eos_token_id, device=ids.device).flatten()
    end = torch.isin(ids, ends) & target & (doc >= 0)
    padding = torch.zeros_like(end)
    padding[:, 1:] = end[:, 1:] & end[:, :-1] & (doc[:, 1:] == doc[:, :-1])
    if not padding.any():
        return None
    run = (~padding).long().cumsum(1)  # the number of tokens before, which a run shares, with the token it follows
    length = torch.zeros_like(run, dtype=torch.float32)
    length = F.pad(length, (0, 1)).scatter_add(1, run, padding.float()).gather(1, run)
    return torch.where(padding, (together / length.clamp(min=1)).clamp(max=1.0), 1.0)
