"""What a model says of given text: each decoding law has its own likelihood.

    ar         exact
    block      -log p_AR(seed) and, for the rest of each window, the masked bound: block size 1 is exactly AR
    diffusion  the masked bound over all targets at once

A bound draws the number m of masked slots uniformly from 1…n, then which ones, and weighs their cross-entropy by
n/m. Its mean is the expected -log p over all orders of revealing one slot at a time (arXiv 2110.02037, section 3), so
it lies above -log of the mean over orders, and no noise floor `eps` enters. A last window that the text cuts short
is scored as the shorter window that it is.

Shapes: B rows, T tokens, S samples.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid import HybridForCausalLM, Layout
from hybrid.noise import noisy_layout, uniform
from hybrid.prediction import predictions, without_mask


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text to be scored.

    Attributes:
        ids: int64 `[B, T]`.
        target: bool `[B, T]`, the tokens that are scored: one unbroken stretch a row; what is before is given, and
            nothing is behind.
        size: bytes of the scored text, for bits per byte.
    """

    ids: Tensor
    target: Tensor
    size: int


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """A negative log-likelihood, or a bound above it.

    Attributes:
        law: which decoding it belongs to.
        nats: of all targets together.
        standard_error: of `nats`, from the Monte Carlo draws; 0 when exact.
        tokens, size: how many targets, and their bytes.
        bound: whether `nats` lies above the law's own number.
    """

    name: str
    law: str
    nats: float
    standard_error: float
    tokens: int
    size: int
    bound: bool

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.size

    def record(self) -> dict[str, object]:
        """For the results document; the standard error is that of `bits_per_byte`."""
        return {
            "name": self.name, "law": self.law, "bits_per_byte": self.bits_per_byte,
            "nats_per_token": self.nats_per_token, "bound": self.bound,
            "standard_error": self.standard_error / math.log(2) / self.size,
        }  # fmt: skip


def slices(documents: Sequence[Sequence[int]], length: int, begin: int) -> tuple[Tensor, Tensor]:
    """Ids and targets, `[B, length]`: every token of every document is a target once; the first slot of a row is
    `begin` or the token before, and is given. Short rows end in `begin`, which is no target.

    Raises:
        ValueError: rows of fewer than two tokens, or no text.
    """
    if length < 2:
        raise ValueError(f"length is {length}; a row is a given token and at least one to score: 2 or more.")
    rows, targets = [], []
    for document in documents:
        text = [begin, *document]
        for at in range(0, len(document), length - 1):
            row = text[at : at + length]
            rows.append(row + [begin] * (length - len(row)))
            targets.append([False] + [True] * (len(row) - 1) + [False] * (length - len(row)))
    if not rows:
        raise ValueError("text: there is nothing to score.")
    return torch.tensor(rows), torch.tensor(targets)


def tokenized(tokenizer: Any, texts: Sequence[str], *, length: int, begin: int, rows: int | None = None) -> Text:
    """Texts as rows of `length` tokens (see `slices`), or `rows` of them, evenly spread. The bytes are those of the
    text itself: a character that two rows share counts once."""
    documents, sizes = [], []
    for text in texts:
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        documents.append(found["input_ids"])
        edges = [span[0] for span in found["offset_mapping"][:: max(1, length - 1)]] + [len(text)]
        sizes += [len(text[a:b].encode(errors="replace")) for a, b in itertools.pairwise(edges)]
    ids, target = slices(documents, length, begin)
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}; score at least one.")
    chosen = torch.linspace(0, len(ids) - 1, min(rows or len(ids), len(ids))).long()
    return Text(ids=ids[chosen], target=target[chosen], size=sum(sizes[i] for i in chosen.tolist()))


@torch.no_grad()
def ar_nll(model: HybridForCausalLM, ids: Tensor, target: Tensor, batch_size: int = 32) -> Tensor:
    """float64 `[B]`: exact -log p of each row's targets, left to right, in nats.

    Raises:
        ValueError: the model's clean text is not causal, or a row's first token is a target.
    """
    _check(model, ids, target)
    if model.config.clean_attention != "causal":
        raise ValueError(
            f"clean_attention={model.config.clean_attention!r} has no left-to-right likelihood; use `bound`."
        )
    out = []
    for rows, goal in zip(ids.split(batch_size), target.split(batch_size), strict=True):
        layout = Layout.causal(torch.arange(rows.shape[1])[None])
        logits = model(rows, layout=layout).logits
        out.append((_nll(model, logits[:, :-1], rows[:, 1:]) * goal[:, 1:]).sum(1))
    return torch.cat(out)


@torch.no_grad()
def bound(
    model: HybridForCausalLM, ids: Tensor, target: Tensor, *, block_size: int | None, seeds: bool,
    samples: int = 4, seed: int = 0, batch_size: int = 32,
) -> Tensor:  # fmt: skip
    """float64 `[S, B]`: independent unbiased estimates of the bound of each row's -log p, in nats.

    The estimator is that of arXiv 2502.09992, equation 6 (m masked of n, uniformly, weight n/m).

    Args:
        block_size: of the windows, which begin at the row's first target; None: one window over all targets.
        seeds: the first token of a window is scored left to right, as `generate` draws it; False is BD3-LM's law.
        seed: of the masks; a row's masks depend on it and on the row's number, not on `batch_size`.

    Raises:
        ValueError: the model has no mask token or no such law.
    """
    _check(model, ids, target)
    config = model.config
    if not config.is_hybrid:
        raise ValueError("a pure AR model (mask_token_id is None) has no diffusion bound; use `ar_nll`.")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1.")
    if seeds and config.clean_attention != "causal":
        raise ValueError(f"seeds: clean_attention={config.clean_attention!r} predicts no seed; use seeds=False.")
    if config.clean_attention == "full" and block_size is not None:
        raise ValueError("block_size: a clean_attention='full' model has one window; use block_size=None.")
    if config.clean_attention == "block" and block_size not in (None, config.block_size):
        raise ValueError(f"block_size: this model's clean text has a grid of {config.block_size}; use that.")
    draws = []
    for sample in range(samples):
        parts = []
        for at in range(0, len(ids), batch_size):
            rows, goal = ids[at : at + batch_size], target[at : at + batch_size]
            index = torch.arange(at, at + len(rows)) * samples + sample
            parts.append(_estimate(model, rows, goal, block_size, seeds, seed, index))
        draws.append(torch.cat(parts))
    return torch.stack(draws)


def _estimate(
    model: HybridForCausalLM, ids: Tensor, target: Tensor, block_size: int | None, seeds: bool, seed: int, index: Tensor
) -> Tensor:
    """float64 `[B]`: one draw of every row."""
    config, (batch, length) = model.config, ids.shape
    assert config.mask_token_id is not None
    place = torch.arange(length).expand(batch, length)
    first = target.long().argmax(1, keepdim=True)
    width = block_size or length
    if config.clean_attention == "block":
        grid = place // config.block_size * config.block_size
        # As decoding opens them: the first window begins on the grid, and what is known of its block is shown.
        starts = grid if block_size else torch.minimum(grid, grid.gather(1, first))
    else:
        starts = torch.where(place < first, place, first + (place - first) // width * width)
    seeded = target & (place == starts) if seeds else torch.zeros_like(target)

    # m of each window's n maskable slots: those of the m lowest random ranks.
    open_ = target & ~seeded
    draws = uniform(seed, index, 2 * length)
    n = torch.zeros(batch, length, dtype=torch.int64).scatter_add(1, starts, open_.long()).gather(1, starts)
    m = 1 + (draws[:, :length].gather(1, starts) * n).long()
    order = (starts + draws[:, length:]).masked_fill(~open_, math.inf).argsort(1).argsort(1)
    ahead = (open_.long().cumsum(1) - open_.long()).gather(1, starts)  # maskable slots of the windows before
    masked = open_ & (order - ahead < m)

    noisy = ids.masked_fill(masked, config.mask_token_id)
    # What lies behind the targets would tell a window where the text ends.
    last = length - 1 - target.flip(1).long().argmax(1, keepdim=True)
    doc = torch.where(place <= last, 0, -1)
    layout = noisy_layout(starts, doc, config)
    if config.clean_attention == "full":
        logits = model(noisy, layout=layout).logits
    else:
        clean = Layout.clean(place, config.clean_attention, config.block_size)
        both = model(torch.cat([ids, noisy], 1), layout=clean.beside(layout)).logits
        clean_logits, logits = both.chunk(2, dim=1)
    nll = _nll(model, predictions(logits, layout, config), ids)
    total = (nll * masked * (n / m.clamp(min=1))).sum(1)
    if seeds:
        total = total + (_nll(model, clean_logits[:, :-1], ids[:, 1:]) * seeded[:, 1:]).sum(1)
    return total


def score(
    model: HybridForCausalLM, text: Text, *, block_sizes: tuple[int, ...] = (), samples: int = 4
) -> list[Likelihood]:
    """The exact likelihood where the model has one, the block bound at each size, and the masked bound.

    Args:
        samples: draws of every bound, at least 2, so that there is a standard error.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}; a standard error takes at least 2.")
    config, tokens, size = model.config, int(text.target.sum()), text.size
    causal, found = config.clean_attention == "causal", []
    if causal:
        nats = float(ar_nll(model, text.ids, text.target).sum())
        found.append(("left to right, exact", "ar", nats, 0.0, False))
    laws: list[tuple[str, str, int | None]] = []
    if config.is_hybrid:
        if config.clean_attention != "full":
            laws += [(f"blocks of {k}, bound", "block", k) for k in block_sizes]
        laws.append(("all at once, bound", "diffusion", None))
    for name, law, k in laws:
        draws = bound(model, text.ids, text.target, block_size=k, seeds=causal and k is not None, samples=samples)
        error = float((draws.var(0, unbiased=True).sum() / samples).sqrt())
        found.append((name, law, float(draws.mean(0).sum()), error, True))
    return [
        Likelihood(name=name, law=law, nats=nats, standard_error=error, tokens=tokens, size=size, bound=above)
        for name, law, nats, error, above in found
    ]


def _nll(model: HybridForCausalLM, logits: Tensor, ids: Tensor) -> Tensor:
    """float64 `[B, T]`: -log p of `ids`; the mask token has no probability."""
    wide = without_mask(logits, model.config).double()
    return F.cross_entropy(wide.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)


def _check(model: HybridForCausalLM, ids: Tensor, target: Tensor) -> None:
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
