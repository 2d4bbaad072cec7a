"""What a model says of given text: each decoding law has its own likelihood.

    ar         exact
    block      -log p of the seed, where a window begins with one, and the masked bound of the window's rest; with
               causal clean text, block size 1 is exactly AR
    masked     the masked bound over all targets at once, which `mode="diffusion"` samples from

A bound draws the number m of masked slots uniformly from 1…n, then which ones, and weighs their cross-entropy by
n/m. Its mean is the expected -log p over all orders of revealing one slot at a time (arXiv 2110.02037, section 3), so
it lies above -log of the mean over orders, and no noise floor `eps` enters; `hybrid.evals.laboratory.orders` comes
closer to that mean. A last window that the text cuts short is scored as the shorter window that it is.

Shapes: B rows, T tokens, S samples.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.common.renamed import renamed_argument
from hybrid.evals.document import Scored
from hybrid.evals.laboratory.orders import order_bound
from hybrid.evals.passes.outputs import Prompt
from hybrid.evals.windows import Windows, by_rows, check_law, check_text, token_nll
from hybrid.law import Law
from hybrid.noise import uniform
from hybrid.texts import decode, encode_behind, encode_document


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
        rows: nats of each row of the text, where they are known.
    """

    name: str
    law: str
    nats: float
    standard_error: float
    tokens: int
    size: int
    bound: bool
    rows: tuple[float, ...] = ()

    @property
    def nats_per_token(self) -> float:
        """The mean of the targets."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """What an encoder would need for a byte of the targets."""
        return self.nats / math.log(2) / self.size

    def record(self) -> Scored:
        """For the results document; the standard error is that of `bits_per_byte`."""
        return Scored(
            name=self.name, law=self.law, bits_per_byte=self.bits_per_byte, nats_per_token=self.nats_per_token,
            bound=self.bound, standard_error=self.standard_error / math.log(2) / self.size,
        )  # fmt: skip


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
    text itself: a character that two rows share counts once.

    Args:
        tokenizer: of the model that will score them.
        texts: each is scored from its beginning.
        begin: the token before a text.

    Raises:
        ValueError: rows of fewer than two tokens, fewer than one row, or no text.
    """
    documents, sizes = [], []
    for text in texts:
        documents.append(encode_document(tokenizer, text))
        cuts = range(0, len(documents[-1]), max(1, length - 1))
        edges = [*_begins(tokenizer, text, documents[-1], cuts), len(text)]
        sizes += [len(text[a:b].encode(errors="replace")) for a, b in itertools.pairwise(edges)]
    ids, target = slices(documents, length, begin)
    if rows is not None and rows < 1:
        raise ValueError(f"rows is {rows}; score at least one.")
    chosen = torch.linspace(0, len(ids) - 1, min(rows or len(ids), len(ids))).long()
    return Text(ids=ids[chosen], target=target[chosen], size=sum(sizes[i] for i in chosen.tolist()))


def text_of(tokenizer: Any, prompts: Sequence[Prompt], model: HybridForCausalLM) -> Text:
    """The targets of the prompts that have one, each after its prompt.

    Raises:
        ValueError: none has one, or a prompt and its target are longer than the model's context.
    """
    pairs = [(p.ids, encode_behind(tokenizer, p.target, "prompts: a target")) for p in prompts if p.target]
    if not pairs:
        raise ValueError("likelihood: no prompt has a target to score; leave --likelihood out.")
    longest = max(len(given) + len(scored) for given, scored in pairs)
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"likelihood: a prompt and its target have {longest} tokens, more than the model's context.")
    ids = torch.tensor([a + b + [a[0]] * (longest - len(a) - len(b)) for a, b in pairs])
    target = torch.zeros_like(ids, dtype=torch.bool)
    for row, (given, scored) in enumerate(pairs):
        target[row, len(given) : len(given) + len(scored)] = True
    return Text(ids=ids, target=target, size=sum(len(p.target.encode(errors="replace")) for p in prompts))


def _begins(tokenizer: Any, text: str, ids: Sequence[int], places: Sequence[int]) -> list[int]:
    """At which characters of a text these of its tokens begin."""
    found = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    if list(found["input_ids"]) == list(ids):
        return [found["offset_mapping"][place][0] for place in places]
    # Where special tokens that are spelled had to be taken apart. A character in several tokens begins with the first.
    return [len(decode(tokenizer, ids[:place]).rstrip("\N{REPLACEMENT CHARACTER}")) for place in places]


@torch.no_grad()
def ar_nll(model: HybridForCausalLM, ids: Tensor, target: Tensor, batch_size: int = 8) -> Tensor:
    """float64 `[B]`: exact -log p of each row's targets, left to right, in nats.

    Args:
        ids, target: int64 and bool `[B, T]`, as in `Text`.
        batch_size: rows in one forward.

    Raises:
        ValueError: the model's clean text is not causal, or a row's first token is a target.
    """
    check_text(model, ids, target)
    law = Law.of(model.config)
    if not law.exact:
        raise ValueError(
            f"clean_attention={model.config.clean_attention!r} has no left-to-right likelihood; use `bound`."
        )
    out = []
    for rows, goal in zip(ids.split(batch_size), target.split(batch_size), strict=True):
        rows, goal = rows.to(model.device), goal.to(model.device)
        hidden = model.model.states(rows, law.clean_rows(torch.zeros_like(rows)))
        nll = token_nll(model, hidden.roll(1, 1), rows, goal)
        out.append(nll.sum(1).cpu())
    return torch.cat(out)


def written_nll(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], batch_size: int = 8
) -> Tensor:
    """float64 `[N]`: exact -log p, left to right, of what any mode wrote after its prompt, in nats.

    Greedy `ar` text is likely by this law; what drafts lose by being chosen independently shows here, where no judge
    is at hand. Token ids of both, `batch_size` in one forward; an output without tokens has 0 nats.

    Raises:
        ValueError: an empty prompt, more or fewer prompts than outputs, or as `ar_nll`.
    """
    if len(prompts) != len(outputs):
        raise ValueError(f"outputs: there are {len(outputs)}, and {len(prompts)} prompts; give one of each.")
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompts[{empty[0]}] is empty: nothing stands before its output; begin it with bos.")
    found = torch.zeros(len(outputs), dtype=torch.float64)
    # Of like lengths together, so that little is computed for padding.
    order = sorted((i for i, text in enumerate(outputs) if len(text)), key=lambda i: len(prompts[i]) + len(outputs[i]))
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        rows = [torch.tensor([*prompts[i], *outputs[i]]) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        position = torch.arange(ids.shape[1])
        begin = torch.tensor([len(prompts[i]) for i in chosen])[:, None]
        end = begin + torch.tensor([len(outputs[i]) for i in chosen])[:, None]
        found[chosen] = ar_nll(model, ids, (position >= begin) & (position < end), batch_size)
    return found


@renamed_argument("seeds", "seed_tokens")
@torch.no_grad()
def bound(
    model: HybridForCausalLM, ids: Tensor, target: Tensor, *, block_size: int | None, seed_tokens: bool,
    samples: int = 4, seed: int = 0, batch_size: int = 8,
) -> Tensor:  # fmt: skip
    """float64 `[S, B]`: independent unbiased estimates of the bound of each row's -log p, in nats.

    The estimator is that of arXiv 2502.09992, equation 6 (m masked of n, uniformly, weight n/m).

    Args:
        ids, target: int64 and bool `[B, T]`, as in `Text`.
        samples: draws of each row, `batch_size` rows in one forward.
        block_size: of the windows, which begin at the row's first target; None: one window over all targets.
        seed_tokens: the first token of a window is scored by the clean text before it, as `generate` draws it; on a
            fixed grid, where a window begins behind whole blocks. False is BD3-LM's law.
        seed: of the masks; a row's masks depend on it and on the row's number, not on `batch_size`.

    Raises:
        ValueError: the model has no mask token or no such law.
    """
    check_law(model, ids, target, block_size, seed_tokens)
    return by_rows(
        lambda rows, goal, index: _estimate(model, rows, goal, block_size, seed_tokens, seed, index),
        ids, target, samples, batch_size,
    )  # fmt: skip


def _estimate(
    model: HybridForCausalLM, ids: Tensor, target: Tensor, block_size: int | None, seed_tokens: bool, seed: int,
    index: Tensor,
) -> Tensor:  # fmt: skip
    """float64 `[B]`: one draw of every row."""
    view = Windows.of(model, ids, target, block_size, seed_tokens)
    # m of each window's n maskable slots: those of the m lowest random ranks.
    draws = uniform(seed, index, 2 * view.length).to(model.device)
    m = 1 + (draws[:, : view.length].gather(1, view.starts) * view.n).long()
    masked = view.open & (view.ranks(draws[:, view.length :]) < m)
    nll, seed_nll = view.nll(model, masked, masked)
    return (nll * (view.n / m.clamp(min=1))).sum(1) + seed_nll.sum(1)


def score(
    model: HybridForCausalLM, text: Text, *, block_sizes: tuple[int, ...] = (), samples: int = 4, orders: int = 0
) -> list[Likelihood]:
    """The exact likelihood where the model has one, the block bound at each size, and the masked bound.

    Args:
        text: what is scored.
        block_sizes: of the block bounds.
        samples: draws of every bound, at least 2, so that there is a standard error.
        orders: also tighten every bound by averaging over this many orders of reveal (see `order_bound` for what that
            costs); 0: do not.

    Raises:
        ValueError: too few samples, or the text cannot be scored.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}; a standard error takes at least 2.")
    if orders < 0:
        raise ValueError(f"orders is {orders}; average over at least one, or 0 to leave it out.")
    own, whole = Law.of(model.config), {"tokens": int(text.target.sum()), "size": text.size}

    def made(name: str, law: str, rows: Tensor, error: float = 0.0, bound: bool = True) -> Likelihood:
        return Likelihood(
            name=name, law=law, nats=float(rows.sum()), standard_error=error, bound=bound, rows=tuple(rows.tolist()),
            **whole,
        )  # fmt: skip

    found = []
    if "ar" in own.likelihoods:
        found.append(made("left to right, exact", "ar", ar_nll(model, text.ids, text.target), bound=False))
    laws: list[tuple[str, str, int | None]] = []
    if "block" in own.likelihoods:
        laws += [(f"blocks of {k}, bound", "block", k) for k in block_sizes]
    if "masked" in own.likelihoods:
        laws.append(("all at once, bound", "masked", None))
    for name, law, k in laws:
        given: dict[str, Any] = {"block_size": k, "seed_tokens": own.seeds and k is not None, "samples": samples}
        bounds = {name: bound(model, text.ids, text.target, **given)}
        if orders:
            bounds[f"{name} of {orders} orders"] = order_bound(model, text.ids, text.target, orders=orders, **given)
        for title, draws in bounds.items():
            error = float((draws.var(0, unbiased=True).sum() / samples).sqrt())
            found.append(made(title, law, draws.mean(0), error))
    return found
