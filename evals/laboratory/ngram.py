"""An n-gram model with modified Kneser-Ney smoothing: the baseline that a neural model has to beat.

    p_k(w | c) = (max(0, count(c w) - D(count)) + mass(c) · p_{k-1}(w | c')) / count(c)        c' is c without its first

(Chen & Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 4.1.6.) The highest
order counts occurrences; a lower one counts the different tokens that come before an n-gram. `mass(c)` is what the
discounts took from the n-grams that begin with c. Under order 1 every token is equally likely.

An n-gram has a number: its place among the sorted keys (number of its first n-1 tokens) · V + (its last token).

Shapes: N tokens of training text, B rows of T tokens, V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

from hybrid.evals.likelihood import Likelihood, Text

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


class NGram:
    """The model of one training text.

    Args:
        ids: int64 `[N]`, the training text, documents end to end.
        order: the n of the n-grams.
        vocab_size: V.

    Raises:
        ValueError: `order` is below 1, or the text is shorter than one n-gram.
    """

    def __init__(self, ids: Integers, *, order: int, vocab_size: int) -> None:
        if order < 1:
            raise ValueError(f"order is {order}; an n-gram has at least one token.")
        if len(ids) < order:
            raise ValueError(f"the training text has {len(ids)} tokens, fewer than one {order}-gram.")
        self.order, self.vocab_size = order, vocab_size
        self.keys: list[Integers] = []
        places: list[Integers] = []  # of each order: the number of the n-gram that begins at each place
        firsts: list[Integers] = []  # and a place where each begins
        for k in range(order):
            number = places[-1][:-1] if k else np.zeros(len(ids), np.int64)
            keys, first, place = np.unique(number * vocab_size + ids[k:], return_index=True, return_inverse=True)
            self.keys.append(keys)
            firsts.append(first)
            places.append(place)
        self.kept: list[Floats] = []  # count less its discount, of each n-gram
        self.total: list[Floats] = []  # of each context: its n-grams' counts together
        self.mass: list[Floats] = []  # and what the discounts took from them
        for k in range(order):
            if k == order - 1:
                count = np.bincount(places[k], minlength=len(self.keys[k]))
            else:
                behind = places[k][firsts[k + 1] + 1]  # each longer n-gram without its first token
                count = np.bincount(behind, minlength=len(self.keys[k]))
            taken = _discounts(count)[np.minimum(count, 3)]
            context = self.keys[k] // vocab_size
            contexts = len(self.keys[k - 1]) if k else 1
            self.kept.append(count - taken)
            self.total.append(_sums(count.astype(np.float64), context, contexts))
            self.mass.append(_sums(taken, context, contexts))

    def probabilities(self, ids: Integers) -> Floats:
        """float64 `[B, T]`: of each token of `ids`, int64 `[B, T]`, given those before it in its row."""
        found = np.full(ids.shape, 1.0 / self.vocab_size)
        for k in range(min(self.order, ids.shape[1])):
            reached = ids.shape[1] - k
            context, token = np.zeros((len(ids), reached), np.int64), ids[:, k:]
            for j in range(k):
                context = self._number(j, context, ids[:, j : j + reached])
            number = self._number(k, context, token)
            known = (context >= 0) & (self.total[k][context] > 0)
            kept = np.where(number >= 0, self.kept[k][number], 0.0)
            mixed = (kept + self.mass[k][context] * found[:, k:]) / np.where(known, self.total[k][context], 1.0)
            found[:, k:] = np.where(known, mixed, found[:, k:])
        return found

    def _number(self, k: int, context: Integers, token: Integers) -> Integers:
        """The number of each context followed by its token, or -1 where training never saw it."""
        key = context * self.vocab_size + token
        place = np.minimum(np.searchsorted(self.keys[k], key), len(self.keys[k]) - 1)
        return np.where((context >= 0) & (self.keys[k][place] == key), place, -1)

    def score(self, text: Text) -> Likelihood:
        """The exact likelihood of a text's targets."""
        probability = self.probabilities(text.ids.numpy())[text.target.numpy()]
        return Likelihood(
            name=f"{self.order}-gram", law=f"{self.order}-gram", nats=float(-np.log(probability).sum()),
            standard_error=0.0, tokens=int(text.target.sum()), size=text.size, bound=False,
        )  # fmt: skip


def _sums(values: Floats, group: Integers, groups: int) -> Floats:
    return np.bincount(group, weights=values, minlength=groups).astype(np.float64)


def _discounts(count: Integers) -> Floats:
    """What is taken from a count of 0, 1, 2 and more: equation 26 of the source.

    Small texts have too few n-grams of some count for it; there it is the count's plain half.
    """
    seen = [float((count == i).sum()) for i in range(5)]
    found = [0.0, 0.5, 1.0, 1.5]
    if seen[1]:
        y = seen[1] / (seen[1] + 2 * seen[2])
        for i in (1, 2, 3):
            if seen[i] and 0 < (taken := i - (i + 1) * y * seen[i + 1] / seen[i]) <= i:
                found[i] = taken
    return np.array(found)
