"""The training loss: left to right on the clean view, masked slots on the noisy one, in one forward.

    L = ar_weight * L_ar + diffusion_weight * L_diff     on the input [x_0 ; x_t]

(Nemotron-Labs-Diffusion, arXiv 2607.05722; the two-stream input is BD3-LM's, arXiv 2503.09573.) Settings of the
same code: pure AR (`diffusion_weight=0`), block diffusion (`ar_weight=0`), and pure masked diffusion (a
`clean_attention="full"` model, which has no clean view).

Shapes: B rows, T tokens, V vocabulary.
"""

from dataclasses import dataclass, field, fields
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid import HybridConfig, HybridForCausalLM, Layout
from hybrid.noise import Noise, Noised, corrupt
from hybrid.prediction import predictions, without_mask


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
    """

    ar_weight: float = 1.0
    diffusion_weight: float = 0.3
    denominator: Literal["per_token", "pooled"] = "per_token"
    noise: Noise = field(default_factory=Noise)

    def check(self, config: HybridConfig, length: int) -> None:
        """Raise ValueError for settings that do not go with the model or with sequences of `length` tokens."""
        if self.ar_weight < 0 or self.diffusion_weight < 0 or self.ar_weight + self.diffusion_weight == 0:
            raise ValueError("ar_weight and diffusion_weight must not be negative, and one must be above 0.")
        if self.denominator not in ("per_token", "pooled"):
            raise ValueError(f"denominator is {self.denominator!r}; use 'per_token' or 'pooled'.")
        if self.ar_weight > 0 and config.clean_attention != "causal":
            raise ValueError(
                f"ar_weight is {self.ar_weight}, and clean_attention={config.clean_attention!r} shows a token what it "
                "should predict: set ar_weight=0, or clean_attention='causal'."
            )
        if self.diffusion_weight > 0:
            if not config.is_hybrid:
                raise ValueError("diffusion_weight is above 0, and the model has no mask_token_id: set one of them.")
            self.noise.check(config, length)


@dataclass(frozen=True)
class Losses:
    """One step's figures: `total` is what is minimised, the parts are in nats.

    Attributes:
        ar: mean next-token cross-entropy; None when not trained.
        diffusion: L_diff; None when not trained.
        masked_accuracy: share of masked slots whose most likely token is right.
        masked_nll: float32 `[n]`, cross-entropy at each masked slot, with its time in `masked_t`, and in `masked_right`
            (bool) whether the most likely token is right.
        slots: of both views that went through the layers.
        logits: rows of logits that were computed.
    """

    total: Tensor
    ar: Tensor | None = None
    diffusion: Tensor | None = None
    masked_accuracy: Tensor | None = None
    masked_nll: Tensor | None = None
    masked_t: Tensor | None = None
    masked_right: Tensor | None = None
    slots: int = 0
    logits: int = 0

    def detached(self) -> "Losses":
        """The same figures, without what gradients need."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Losses(**{k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()})


def losses(model: HybridForCausalLM, batch: Batch, objective: Objective, seed: int) -> Losses:
    """The loss of one batch. Logits are computed only where they are read."""
    ids, target, doc, config = batch["input_ids"], batch["target"], batch["doc"], model.config
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    clean = Layout.clean(place, config.clean_attention, config.block_size)
    if (doc != 0).any():
        clean = clean.where(doc >= 0, doc)
    noised = None
    if objective.diffusion_weight > 0:
        noised = corrupt(ids, target, doc, batch["index"], objective.noise, config, seed)

    slots, rows = ids.numel(), 0
    if noised is None:
        clean_hidden = model.model(ids, clean)
    elif config.clean_attention == "full":
        noisy_hidden = model.model(noised.tokens, noised.layout)
        slots = noised.tokens.numel()
    else:
        slots += noised.tokens.numel()
        both = model.model(torch.cat([ids, noised.tokens], 1), clean.beside(noised.layout))
        clean_hidden, noisy_hidden = both.tensor_split([ids.shape[1]], dim=1)

    total = torch.zeros((), device=ids.device)
    ar = None
    if objective.ar_weight > 0:
        follows = target[:, 1:] & (doc[:, 1:] == doc[:, :-1])
        logits = without_mask(model.lm_head(clean_hidden[:, :-1][follows]), config)
        ar = F.cross_entropy(logits.float(), ids[:, 1:][follows])
        total = total + objective.ar_weight * ar
        rows += len(logits)
    if noised is None:
        return Losses(total, ar, slots=slots, logits=rows)
    wanted = ids[:, noised.begin :][noised.masked]
    diffusion, right, nll = _masked_loss(model, noisy_hidden, noised, wanted, target.sum(), objective)
    total = total + objective.diffusion_weight * diffusion
    return Losses(
        total, ar, diffusion, masked_accuracy=right.float().mean(), masked_nll=nll.detach(),
        masked_t=noised.t[noised.masked], masked_right=right, slots=slots, logits=rows + len(wanted),
    )  # fmt: skip


def _masked_loss(
    model: HybridForCausalLM, hidden: Tensor, noised: Noised, wanted: Tensor, targets: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """L_diff, and of each masked slot whether the most likely token is `wanted`, int64 `[n]`, and the cross-entropy."""
    masked, weight = noised.masked, noised.weight[noised.masked]
    aligned = predictions(hidden, noised.layout, model.config)[masked]
    logits = without_mask(model.lm_head(aligned), model.config).float()
    nll = F.cross_entropy(logits, wanted, reduction="none")
    count = targets if objective.denominator == "per_token" else weight.sum()
    right = logits.detach().argmax(-1) == wanted
    return (weight * nll).sum() / count.clamp(min=1e-6), right, nll
