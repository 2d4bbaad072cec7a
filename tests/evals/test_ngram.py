"""The n-gram baseline against a slow one that counts in dictionaries, and against what any law must fulfil."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from hybrid.evals.laboratory.ngram import NGram, _discounts
from hybrid.evals.likelihood import Text


def slow(text: list[int], order: int, vocab_size: int):
    """p(token, context) by the definition, one dictionary an order."""
    counts: list[Counter] = [Counter() for _ in range(order + 1)]
    for i in range(len(text) - order + 1):
        counts[order][tuple(text[i : i + order])] += 1
    for k in range(order - 1, 0, -1):
        before = defaultdict(set)
        for i in range(len(text) - k):
            before[tuple(text[i + 1 : i + 1 + k])].add(text[i])
        for gram, tokens in before.items():
            counts[k][gram] = len(tokens)

    def taken(k: int, count: int) -> float:
        every = {tuple(text[i : i + k]) for i in range(len(text) - k + 1)}
        return float(_discounts(np.array([counts[k][gram] for gram in every]))[min(count, 3)])

    def p(token: int, context: tuple[int, ...]) -> float:
        k = len(context) + 1
        lower = p(token, context[1:]) if context else 1 / vocab_size
        grams = {gram: n for gram, n in counts[k].items() if gram[:-1] == context}
        total = sum(grams.values())
        if not total:
            return lower
        mass = sum(taken(k, n) for n in grams.values())
        own = grams.get((*context, token), 0)
        return (own - (taken(k, own) if own else 0) + mass * lower) / total

    return p


@pytest.fixture(scope="module")
def text() -> list[int]:
    source = torch.Generator().manual_seed(0)
    weights = torch.rand(6, 6, generator=source) ** 4
    found = [0]
    for _ in range(400):
        found.append(int(torch.multinomial(weights[found[-1]], 1, generator=source)))
    return found


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_definition(text: list[int], order: int) -> None:
    model, p = NGram(np.array(text), order=order, vocab_size=7), slow(text, order, 7)
    source = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 7, (6, 9), generator=source).numpy()  # token 6 never occurs
    for row, found in zip(rows, model.probabilities(rows), strict=True):
        wanted = [p(int(row[i]), tuple(map(int, row[max(0, i - order + 1) : i]))) for i in range(len(row))]
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_is_a_law(text: list[int]) -> None:
    """After any context, seen or not, the probabilities of all tokens sum to 1."""
    model = NGram(np.array(text), order=3, vocab_size=7)
    rows = np.array([[a, b, c] for a in range(7) for b in range(7) for c in range(7)])
    np.testing.assert_allclose(model.probabilities(rows)[:, 2].reshape(49, 7).sum(1), 1.0, rtol=1e-12)


def test_learns(text: list[int]) -> None:
    """More context helps on text of the same source, and the score is that of the targets alone."""
    ids, held_out = np.array(text[:300]), torch.tensor([text[300:]])
    target = torch.ones_like(held_out, dtype=torch.bool)
    target[:, :4] = False
    scores = [NGram(ids, order=n, vocab_size=7).score(Text(ids=held_out, target=target, size=50)) for n in (1, 2)]
    assert scores[1].nats < 0.9 * scores[0].nats
    assert scores[0].tokens == target.sum() and not scores[0].bound
    p = slow(text[:300], 1, 7)
    assert scores[0].nats == pytest.approx(-sum(math.log(p(t, ())) for t in text[304:]))


@pytest.mark.parametrize(("order", "field"), [(0, "order is 0"), (9, "9-gram")])
def test_says_what_it_needs(order: int, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        NGram(np.arange(5), order=order, vocab_size=5)
