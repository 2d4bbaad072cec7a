"""The bound of several orders against every way to draw them."""

import math
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from enumerated import TOY, Law, all_texts, toy
from oracles import texts
from torch import Tensor

from hybrid.evals.laboratory import orders
from hybrid.evals.laboratory.orders import order_bound
from hybrid.evals.likelihood import ar_nll, bound

KINDS = [
    ("causal", None, False), ("causal", 3, True), ("block", 2, False), ("block, next", 3, True), ("full", None, False),
]  # fmt: skip


@cache
def law_of(kind: str, size: int | None, seeds: bool) -> Law:
    return Law(toy(kind, 2, block_size=size or 2), *all_texts(), size, seeds)


@cache
def moments(kind: str, size: int | None, seeds: bool, count: int) -> tuple[Tensor, Tensor]:
    """Mean `[B]` and variance `[B]` of one sample with `count` orders, over all n! ** count draws of each window."""
    law = law_of(kind, size, seeds)
    mean, variance = law.seeds, torch.zeros_like(law.seeds)
    for window in law.windows:
        chance = (-window.orders()).exp()
        draws = torch.stack([-(sum(chance[i] for i in pick) / count).log()  # type: ignore[union-attr]
                             for pick in product(range(len(chance)), repeat=count)])  # fmt: skip
        mean, variance = mean + draws.mean(0), variance + draws.var(0, unbiased=False)
    return mean, variance


@pytest.mark.parametrize(("kind", "size", "seeds"), KINDS)
def test_the_enumerated_bound_falls_towards_the_law(kind: str, size: int | None, seeds: bool) -> None:
    """About the laws as written in the tests, on all 81 texts: what `order_bound` is then held against."""
    law = law_of(kind, size, seeds)
    counts = (1, 2, 3) if len(law.windows[0].open) < 4 else (1, 2)  # 24 orders, three at a time, take too long
    falling = [*(moments(kind, size, seeds, count)[0] for count in counts), law.exact()]
    torch.testing.assert_close(falling[0], law.expectation(), rtol=0, atol=1e-12)
    for loose, tight in pairwise(falling):
        assert (loose >= tight - 1e-12).all()
        assert float((loose - tight).sum()) > 0.01


@pytest.mark.parametrize(("kind", "size", "seeds"), KINDS)
@pytest.mark.parametrize("count", [1, 2])
def test_the_estimate_is_the_enumerated_bound(kind: str, size: int | None, seeds: bool, count: int) -> None:
    model, (ids, target) = toy(kind, 2, block_size=size or 2), all_texts()
    mean, variance = moments(kind, size, seeds, count)
    samples = 12
    draws = order_bound(
        model, ids, target, block_size=size, seed_tokens=seeds, orders=count, samples=samples, batch_size=99
    )
    assert draws.shape == (samples, 81) and draws.dtype == torch.float64
    error = float((variance.sum() / samples).sqrt())
    assert float((draws.mean(0) - mean).sum()) == pytest.approx(0, abs=4 * error + 1e-9)


def test_a_mean_after_the_logarithm_and_one_of_the_wrong_size_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, target) = toy("causal", 2), all_texts()
    mean, variance = moments("causal", None, False, 2)
    given = {"block_size": None, "seed_tokens": False, "orders": 2, "samples": 12, "batch_size": 99}

    def off() -> float:
        error = float((variance.sum() / 12).sqrt())
        return abs(float((order_bound(model, ids, target, **given).mean(0) - mean).sum())) / error

    assert off() < 4
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "logsumexp", lambda x, dim: x.mean(dim) + math.log(x.shape[dim]))
        assert off() > 8
    with monkeypatch.context() as patch:
        patch.setattr(orders.math, "log", lambda x: 0.0)
        assert off() > 8


def test_many_orders_come_close_to_the_law() -> None:
    """One text, so that many draws are cheap: 64 of 24 orders leave little of the gap."""
    model, (ids, target) = toy("causal", 2), all_texts()
    law = law_of("causal", None, False)
    worst = int((law.expectation() - law.exact()).argmax())
    one, goal = ids[worst : worst + 1], target[worst : worst + 1]
    found = order_bound(model, one, goal, block_size=None, seed_tokens=False, orders=64, samples=20).mean()
    gap = float((law.expectation() - law.exact())[worst])
    assert float(found - law.exact()[worst]) == pytest.approx(0, abs=gap / 5)
    loose = bound(model, one, goal, block_size=None, seed_tokens=False, samples=200).mean()
    assert float(loose - law.exact()[worst]) > gap / 2


def test_windows_of_one_with_seeds_are_exact_and_need_no_order() -> None:
    model, (ids, target) = toy("causal", 4), all_texts()
    draws = order_bound(model, ids, target, block_size=1, seed_tokens=True, orders=3, samples=2)
    torch.testing.assert_close(draws, ar_nll(model, ids, target).expand(2, -1), rtol=0, atol=1e-12)


def test_the_batch_size_changes_nothing_and_the_seed_does() -> None:
    model = toy("causal", 5)
    ids, place = torch.tensor(texts(6, [9] * 5, TOY)), torch.arange(9)
    target = (place >= torch.tensor([1, 3, 2, 7, 1])[:, None]) & (place <= torch.tensor([8, 6, 2, 8, 5])[:, None])
    given = {"block_size": 3, "seed_tokens": True, "orders": 4}
    whole = order_bound(model, ids, target, **given)
    state = torch.get_rng_state()
    for size in (1, 5, 8):
        torch.testing.assert_close(order_bound(model, ids, target, batch_size=size, **given), whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert (order_bound(model, ids, target, seed=1, **given) - whole).abs().max() > 1e-3


def test_no_order_is_no_bound() -> None:
    with pytest.raises(ValueError, match="orders is 0"):
        order_bound(toy("causal"), *all_texts(), block_size=None, seed_tokens=False, orders=0)
    with pytest.raises(ValueError, match="grid of 2"):
        order_bound(toy("block"), *all_texts(), block_size=3, seed_tokens=False, orders=2)
