"""Every text of a toy vocabulary, and every law of decoding written out from forwards over one window at a time.

Three tokens and a mask, a given first token, and four tokens to be scored: 81 texts, of which every law must give
all the probability away, 15 ways to mask, 24 orders.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, permutations, product
from typing import Any

import torch
from oracles import clean_labels, layout_of, tiny
from torch import Tensor

from hybrid import HybridForCausalLM

TOY, FREE = 3, 4
MODELS = {
    "causal": {}, "causal, next": {"diffusion_prediction": "next"}, "normed": {"qk_norm": True},
    "block": {"clean_attention": "block"}, "block, next": {"clean_attention": "block", "diffusion_prediction": "next"},
    "full": {"clean_attention": "full"}, "full, next": {"clean_attention": "full", "diffusion_prediction": "next"},
}  # fmt: skip
CAUSAL = ["causal", "causal, next", "normed"]
SEEDED = [*CAUSAL, "block, next"]  # clean text says what follows it, and windows begin with that


def toy(kind: str, seed: int = 0, **fields: Any) -> HybridForCausalLM:
    return tiny(seed, **{"vocab_size": TOY + 1, "mask_token_id": TOY, "block_size": 2, **MODELS[kind], **fields})


def all_texts(given: Sequence[int] = (0,), behind: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Every text that begins with `given`, and what of it is scored."""
    ids = torch.tensor([[*given, *free, *behind] for free in product(range(TOY), repeat=FREE)])
    place = torch.arange(ids.shape[1]).expand_as(ids)
    return ids, (place >= len(given)) & (place < len(given) + FREE)


# --- The laws, slowly ---------------------------------------------------------------------------------------


@torch.no_grad()
def log_probs(model: HybridForCausalLM, tokens: Tensor, labels: Sequence[tuple[int, int, int, int]]) -> Tensor:
    logits = model(tokens, layout=layout_of(labels)).logits
    logits[..., TOY] = -torch.inf
    return logits.log_softmax(-1)


def left_to_right(model: HybridForCausalLM, ids: Tensor, place: int) -> Tensor:
    """`[B]`: -log p of the token at `place`, given all that is before it, by the clean text there."""
    law = log_probs(model, ids[:, :place], clean_labels(model, place))[:, -1]
    return -law.gather(1, ids[:, place : place + 1])[:, 0]


def at_hidden(model: HybridForCausalLM, ids: Tensor, window: range, hidden: Sequence[int]) -> Tensor:
    """`[B, len(hidden)]`: -log p of each hidden token of a window, given the others and what is before it."""
    start = window.start
    own = [(i, start, 1, 0) for i in window]
    tokens = ids[:, : window.stop].clone()
    tokens[:, list(hidden)] = TOY
    law = log_probs(model, tokens, clean_labels(model, start) + own)
    shift = model.config.diffusion_prediction == "next"
    source = [i - 1 if shift and i > start else i for i in hidden]
    return torch.stack([-law[:, s].gather(1, ids[:, i : i + 1])[:, 0] for s, i in zip(source, hidden, strict=True)], 1)


class Window:
    """What is to be known of one window: the cross-entropy at each slot, for each set of hidden slots."""

    def __init__(self, model: HybridForCausalLM, ids: Tensor, window: range, open_: Sequence[int]) -> None:
        self.open, self.batch = open_, len(ids)
        self.nll = {
            hidden: dict(zip(hidden, at_hidden(model, ids, window, hidden).unbind(1), strict=True))
            for count in range(1, len(open_) + 1)
            for hidden in combinations(open_, count)
        }

    def masks(self) -> list[tuple[float, tuple[int, ...]]]:
        """Every mask with its probability: the number of hidden slots is uniform, then which ones."""
        n = len(self.open)
        return [(1 / n / math.comb(n, len(hidden)), hidden) for hidden in self.nll]

    def draw(self, hidden: tuple[int, ...], weight: Callable[[int, int], float] = lambda n, m: n / m) -> Tensor:
        return weight(len(self.open), len(hidden)) * torch.stack(list(self.nll[hidden].values())).sum(0)

    def expectation(self, **kwargs: Any) -> Tensor:
        zero = torch.zeros(self.batch, dtype=torch.float64)
        return sum((share * self.draw(hidden, **kwargs) for share, hidden in self.masks()), zero)

    def variance(self) -> Tensor:
        zero = torch.zeros(self.batch, dtype=torch.float64)
        second = sum((share * self.draw(hidden) ** 2 for share, hidden in self.masks()), zero)
        return second - self.expectation() ** 2

    def orders(self) -> Tensor:
        """`[n!, B]`: -log p of revealing one slot at a time, in every order."""
        found = []
        for order in permutations(self.open):
            left, total = list(self.open), torch.zeros(self.batch, dtype=torch.float64)
            for place in order:
                total = total + self.nll[tuple(left)][place]
                left.remove(place)
            found.append(total)
        return torch.stack(found)


class Law:
    """A decoding law over a whole text: seeds, left to right, and windows."""

    def __init__(
        self, model: HybridForCausalLM, ids: Tensor, target: Tensor, size: int | None, seeds: bool
    ) -> None:
        places = target[0].nonzero()[:, 0].tolist()
        first, end = places[0], places[-1] + 1
        clean = model.config.clean_attention
        # Where decoding opens its first window: at the first token that it writes; on the grid; over everything.
        begin = {"causal": first, "block": first // model.config.block_size * model.config.block_size, "full": 0}[clean]
        starts = list(range(begin, end, size or end))
        windows = [range(a, min(b, end)) for a, b in zip(starts, [*starts[1:], end], strict=True)]
        self.seeds = torch.zeros(len(ids), dtype=torch.float64)
        self.windows = []
        for window in windows:
            open_ = [i for i in window if i >= first]
            if seeds and window.start >= first:  # a window with known tokens goes on from them, without a seed
                self.seeds = self.seeds + left_to_right(model, ids, open_.pop(0))
            if open_:
                self.windows.append(Window(model, ids, window, open_))

    def expectation(self, **kwargs: Any) -> Tensor:
        return self.seeds + sum((w.expectation(**kwargs) for w in self.windows), torch.zeros_like(self.seeds))

    def deviation(self) -> Tensor:
        return sum((w.variance() for w in self.windows), torch.zeros_like(self.seeds)).clamp(min=0).sqrt()

    def exact(self) -> Tensor:
        """-log p, orders being drawn uniformly."""
        total = self.seeds
        for window in self.windows:
            orders = window.orders()
            total = total - ((-orders).logsumexp(0) - math.log(len(orders)))
        return total
