"""The training loss: left to right on the clean view, masked slots on the noisy one, in one forward.

    L = ar_weight * L_ar + diffusion_weight * L_diff     on the input [x_0 ; x_t]

(Nemotron-Labs-Diffusion, arXiv 2607.05722; the two-stream input is BD3-LM's, arXiv 2503.09573.) Settings of the
same code: pure AR (`diffusion_weight=0`), block diffusion (`ar_weight=0`), and pure masked diffusion (a
`clean_attention="full"` model, which has no clean view). With complementary masks there are two noisy views.

Shapes: B rows, T tokens, V vocabulary.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.law import Law
from hybrid.noise import Noise, Noised, corrupt
from hybrid.training.cross_entropy import cross_entropy
from hybrid.training.curriculum import Curriculum


class Batch(TypedDict):
    """input_ids int64, target bool (tokens to be learned) and doc int64 (-1: padding), all `[B, T]`; index int64
    `[B]`, the number of each sample in the stream."""

    input_ids: Tensor
    target: Tensor
    doc: Tensor
    index: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
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
        if self.ar_weight < 0 or self.diffusion_weight < 0 or self.ar_weight + self.diffusion_weight == 0:
            raise ValueError("ar_weight and diffusion_weight must not be negative, and one must be above 0.")
        if self.denominator not in ("per_token", "pooled"):
            raise ValueError(f"denominator is {self.denominator!r}; use 'per_token' or 'pooled'.")
        if not 0 <= self.ar_first < 1:
            raise ValueError(f"ar_first is {self.ar_first}; it is the share of the job's first stage, below 1.")
        if self.ar_first > 0 and min(self.ar_weight, self.diffusion_weight) == 0:
            raise ValueError(f"ar_first is {self.ar_first}: two stages need both weights above 0.")
        if self.z_loss < 0:
            raise ValueError(f"z_loss is {self.z_loss}; it must not be negative (1e-4 is usual).")
        if self.eos_padding_weight is not None and self.eos_padding_weight < 0:
            raise ValueError(f"eos_padding_weight is {self.eos_padding_weight}; it must not be negative, or None.")
        if self.ar_weight > 0 and not Law.of(config).exact:
            raise ValueError(
                f"ar_weight is {self.ar_weight}, and clean_attention={config.clean_attention!r} shows a token what it "
                "should predict: set ar_weight=0, or clean_attention='causal'."
            )
        if self.curriculum is not None:
            self._check_curriculum(self.curriculum, config, length)
        if self.diffusion_weight > 0:
            if not config.is_hybrid:
                raise ValueError("diffusion_weight is above 0, and the model has no mask_token_id: set one of them.")
            self.at(1.0).noise.check(config, length)

    def _check_curriculum(self, curriculum: Curriculum, config: HybridConfig, length: int) -> None:
        curriculum.check(length)
        if self.diffusion_weight == 0:
            raise ValueError("curriculum: with diffusion_weight=0 there are no blocks; leave it out.")
        if self.noise.block_sizes:
            raise ValueError("curriculum and noise.block_sizes both say how long blocks are: give one of them.")
        if not Law.of(config).cached:
            raise ValueError("curriculum: a clean_attention='full' model has one block, the whole row; leave it out.")


@dataclass(frozen=True)
class Losses:
    """One step's figures: `total` is what is minimised, the parts are in nats.

    Attributes:
        ar: mean next-token cross-entropy; None when not trained.
        diffusion: L_diff; None when not trained.
        masked_accuracy: share of masked slots whose most likely token is right; None where nothing is masked.
        kept: tokens that a round of speculation would keep; None where no drafter is trained.
        masked_nll: `[n]`, cross-entropy at each masked slot, with its time in `masked_t`, and in `masked_right`
            (bool) whether the most likely token is right.
        z: mean log(Z)^2; None without `z_loss`.
        slots: of both views that went through the layers.
        logits: rows of logits that were computed.
    """

    total: Tensor
    ar: Tensor | None = None
    diffusion: Tensor | None = None
    masked_accuracy: Tensor | None = None
    masked_nll: Tensor | None = None
    masked_t: Tensor | None = None
    z: Tensor | None = None
    kept: Tensor | None = None
    masked_right: Tensor | None = None
    slots: int = 0
    logits: int = 0

    def detached(self) -> "Losses":
        """The same figures, without what gradients need."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            values[name] = value.detach() if isinstance(value, Tensor) else value
        return Losses(**values)


def losses(model: HybridForCausalLM, batch: Batch, objective: Objective, seed: int) -> Losses:
    """The loss of one batch. Logits are computed only where they are read."""
    ids, target, doc, config = batch["input_ids"], batch["target"], batch["doc"], model.config
    law, noised = Law.of(config), None
    if objective.diffusion_weight > 0:
        noised = corrupt(ids, target, doc, batch["index"], objective.noise, config, seed)
    clean_hidden, noisy_hidden = _hidden(model, batch, noised, objective.noise)
    share = _padding_weight(ids, target, doc, config, objective.eos_padding_weight)

    slots = sum(x.shape[:2].numel() for x in (clean_hidden, noisy_hidden) if x is not None)
    found = Losses(torch.zeros((), device=ids.device), slots=slots)
    squares = []
    if objective.ar_weight > 0:
        assert clean_hidden is not None
        follows = target[:, 1:] & (doc[:, 1:] == doc[:, :-1])
        logits = model.lm_head(clean_hidden[:, :-1][follows])
        nll, log_z, _ = cross_entropy(logits, ids[:, 1:][follows], config.mask_token_id)
        squares.append(log_z**2)
        ar = nll.mean() if share is None else _weighted_mean(nll, share[:, 1:][follows])
        found = replace(found, total=objective.ar_weight * ar, ar=ar, logits=len(logits))
    if noised is not None:
        assert noisy_hidden is not None
        masked, place = noised.masked, noised.layout.position
        wanted = ids.gather(1, place)[masked]
        logits = model.lm_head(law.predictions(noisy_hidden, noised.layout)[masked])
        nll, log_z, best = cross_entropy(logits, wanted, config.mask_token_id)
        squares.append(log_z**2)
        weight, count = noised.weight[masked], target.sum()
        if share is not None:
            weight, count = weight * share.gather(1, place)[masked], (share * target).sum()
        count = count if objective.denominator == "per_token" else weight.sum()
        diffusion = (weight * nll).sum() / count.clamp(min=1e-6)
        right = best == wanted
        found = replace(
            found, total=found.total + objective.diffusion_weight * diffusion, diffusion=diffusion,
            masked_accuracy=right.float().mean() if len(right) else None, masked_nll=nll.detach(),
            masked_t=noised.t[masked], masked_right=right, logits=found.logits + len(logits),
        )  # fmt: skip
    if objective.z_loss > 0:
        each = torch.cat(squares)
        z = each.sum() / max(1, len(each))
        found = replace(found, total=found.total + objective.z_loss * z, z=z)
    return found


def _hidden(
    model: HybridForCausalLM, batch: Batch, noised: Noised | None, noise: Noise
) -> tuple[Tensor | None, Tensor | None]:
    """Hidden states of the clean view and of the noisy one, where there is one, from one forward."""
    ids, doc, law = batch["input_ids"], batch["doc"], Law.of(model.config)
    if noised is not None and not law.cached:
        return None, model.model.states(noised.tokens, noised.layout)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    # A block-causal model's clean text has the blocks of its noisy one, which a curriculum changes.
    clean = law.clean(place, noise.block_sizes[0] if noise.block_sizes else None)
    if (doc != 0).any():
        clean = clean.where(doc >= 0, doc)
    if noised is None:
        return model.model.states(ids, clean), None
    both = model.model.states(torch.cat([ids, noised.tokens], 1), clean.beside(noised.layout))
    clean_hidden, noisy_hidden = both.tensor_split([ids.shape[1]], dim=1)
    return clean_hidden, noisy_hidden


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


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    return (weight * values).sum() / weight.sum().clamp(min=1e-6)
