"""Likelihoods against everything there is: a toy vocabulary, all texts of a length, all masks and all orders.

Three tokens and a mask, a given first token, and four tokens to be scored: 81 texts, of which every law must give
all the probability away, 15 ways to mask, 24 orders. The laws are written out here from forwards over one
window at a time.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, permutations, product
from typing import Any

import pytest
import torch
from oracles import layout_of, texts, tiny
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.evals.likelihood import Likelihood, Text, ar_nll, bound, score, slices

TOY, FREE = 3, 4
MODELS = {
    "causal": {}, "causal, next": {"diffusion_prediction": "next"}, "normed": {"qk_norm": True},
    "block": {"clean_attention": "block"}, "block, next": {"clean_attention": "block", "diffusion_prediction": "next"},
    "full": {"clean_attention": "full"}, "full, next": {"clean_attention": "full", "diffusion_prediction": "next"},
}  # fmt: skip
CAUSAL = ["causal", "causal, next", "normed"]


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
    """`[B]`: -log p of the token at `place`, given all that is before it."""
    law = log_probs(model, ids[:, :place], [(i, i, 0, 0) for i in range(place)])[:, -1]
    return -law.gather(1, ids[:, place : place + 1])[:, 0]


def at_hidden(model: HybridForCausalLM, ids: Tensor, window: range, hidden: Sequence[int]) -> Tensor:
    """`[B, len(hidden)]`: -log p of each hidden token of a window, given the others and what is before it."""
    start, size = window.start, model.config.block_size
    by_grid = model.config.clean_attention == "block"
    before = [(i, i // size * size if by_grid else i, 0, 0) for i in range(start)]
    own = [(i, start, 1, 0) for i in window]
    tokens = ids[:, : window.stop].clone()
    tokens[:, list(hidden)] = TOY
    law = log_probs(model, tokens, before + own)
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
            if seeds:
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


# --- Left to right ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", CAUSAL)
def test_left_to_right_gives_all_probability_away(kind: str, seed: int) -> None:
    ids, target = all_texts()
    found = ar_nll(toy(kind, seed), ids, target)
    assert found.dtype == torch.float64
    assert float((-found).exp().sum()) == pytest.approx(1, abs=1e-12)
    slow = sum(left_to_right(toy(kind, seed), ids, place) for place in range(1, 5))
    torch.testing.assert_close(found, slow, rtol=0, atol=1e-12)
    assert found.std() > 0.5  # a model of nothing would pass the above


def test_a_pure_left_to_right_model_is_scored_too() -> None:
    ids, target = all_texts()
    found = ar_nll(toy("causal", vocab_size=TOY, mask_token_id=None), ids, target)
    assert float((-found).exp().sum()) == pytest.approx(1, abs=1e-12)


# --- Bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_masked_bound_is_the_mean_over_all_orders(kind: str) -> None:
    """About the laws as written here: if this holds, they are right, and `bound` can be held against them."""
    ids, target = all_texts()
    law = Law(toy(kind, 1), ids, target, None, seeds=False)
    if kind.startswith("block"):
        assert [list(w.open) for w in law.windows] == [[1, 2, 3, 4]]
    orders = law.windows[0].orders()
    assert orders.shape == (24, 81)
    torch.testing.assert_close(orders.mean(0), law.expectation(), rtol=0, atol=1e-12)
    # Each order, and so their mixture, is a distribution; the bound lies above it.
    torch.testing.assert_close((-orders).exp().sum(1), torch.ones(24, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float((-law.exact()).exp().sum()) == pytest.approx(1, abs=1e-12)
    assert (law.expectation() > law.exact()).all()


LAWS = [
    *((kind, None, False) for kind in MODELS),
    *((kind, size, seeds) for kind in CAUSAL[:2] for size in (1, 2, 3, 9) for seeds in (True, False)),
    ("causal", None, True), ("normed", 3, True), ("block", 2, False), ("block, next", 2, False),
]  # fmt: skip
GIVEN = [(0,), (1, 0, 2)]


class Estimate:
    """How far the draws of `bound` are off a law, in standard errors that the law itself gives."""

    def __init__(
        self, model: HybridForCausalLM, ids: Tensor, target: Tensor, size: int | None, seeds: bool, samples: int
    ) -> None:
        draws = bound(model, ids, target, block_size=size, seeds=seeds, samples=samples, seed=3, batch_size=81)
        assert draws.shape == (samples, 81)
        assert draws.dtype == torch.float64
        self.mean, self.samples = draws.mean(0), samples

    def off(self, law: Law, expected: Tensor) -> float:
        """All texts together, whose draws are independent."""
        error = float((law.deviation().square().sum() / self.samples).sqrt())
        return abs(float((self.mean - expected).sum())) / error

    def check(self, law: Law) -> None:
        expected, error = law.expectation(), law.deviation() / math.sqrt(self.samples)
        sure = error < 1e-9  # windows of one open slot: nothing is left to chance
        torch.testing.assert_close(self.mean[sure], expected[sure], rtol=0, atol=1e-12)
        if not sure.all():
            assert self.off(law, expected) < 4
            # And each text for itself: the squares of their 81 standard scores add up to about 81.
            scores = (self.mean - expected)[~sure] / error[~sure]
            assert float(scores.square().sum()) < len(scores) + 6 * math.sqrt(2 * len(scores))


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(("kind", "size", "seeds"), LAWS)
def test_the_bound_is_the_enumerated_one(kind: str, size: int | None, seeds: bool, given: tuple[int, ...]) -> None:
    model, (ids, target) = toy(kind, 2), all_texts(given)
    law = Law(model, ids, target, size, seeds)
    Estimate(model, ids, target, size, seeds, samples=15).check(law)
    assert (law.expectation() >= law.exact() - 1e-12).all()
    assert float((-law.exact()).exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("given", GIVEN)
def test_blocks_of_one_with_seeds_are_exactly_left_to_right(kind: str, given: tuple[int, ...]) -> None:
    model, (ids, target) = toy(kind, 4), all_texts(given)
    draws = bound(model, ids, target, block_size=1, seeds=True, samples=3)
    torch.testing.assert_close(draws, ar_nll(model, ids, target).expand(3, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", GIVEN)
def test_the_comparison_tells_wrong_formulas_from_right_ones(given: tuple[int, ...]) -> None:
    model, (ids, target) = toy("causal", 2), all_texts(given)
    law, found = Law(model, ids, target, 3, True), Estimate(model, ids, target, 3, True, samples=60)
    assert found.off(law, law.expectation()) < 4
    wrong = {
        "no weight": law.expectation(weight=lambda n, m: 1),
        "a weight of 1/m": law.expectation(weight=lambda n, m: 1 / m),
        "a weight of n/(m+1)": law.expectation(weight=lambda n, m: n / (m + 1)),
        "seeds twice": law.expectation() + law.seeds,
        "no seeds": law.expectation() - law.seeds,
        "seeds in the bound, too": Law(model, ids, target, 3, False).expectation() + law.seeds,
        "windows of another size": Law(model, ids, target, 2, True).expectation(),
    }
    assert {name: found.off(law, expected) > 8 for name, expected in wrong.items()} == dict.fromkeys(wrong, True)


def test_a_mutant_without_the_weight_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the library's own code made wrong: whatever it divides comes out as 1 at most."""
    model, (ids, target) = toy("causal", 2), all_texts()
    law = Law(model, ids, target, 3, False)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__truediv__", lambda a, b: torch.true_divide(a, b).clamp(max=1))
        mutant = Estimate(model, ids, target, 3, False, samples=15)
    assert mutant.off(law, law.expectation()) > 8
    with pytest.raises(AssertionError):
        mutant.check(law)
    Estimate(model, ids, target, 3, False, samples=15).check(law)


# --- What an estimate depends on ----------------------------------------------------------------------------


def ragged(kind: str) -> tuple[HybridForCausalLM, Tensor, Tensor]:
    """Rows whose targets begin and end at different places."""
    ids = torch.tensor(texts(6, [12] * 7, TOY))
    place = torch.arange(12)
    first, last = torch.tensor([1, 3, 2, 7, 1, 5, 4])[:, None], torch.tensor([11, 9, 2, 11, 6, 8, 11])[:, None]
    return toy(kind, 5, block_size=3), ids, (place >= first) & (place <= last)


def law_of(kind: str) -> dict[str, Any]:
    return {"block_size": None if kind.startswith("full") else 3, "seeds": kind in CAUSAL}


@pytest.mark.parametrize("kind", MODELS)
def test_the_batch_size_changes_nothing(kind: str) -> None:
    model, ids, target = ragged(kind)
    whole = bound(model, ids, target, samples=3, **law_of(kind))
    for size in (1, 2, 5):
        torch.testing.assert_close(bound(model, ids, target, samples=3, batch_size=size, **law_of(kind)), whole)
        if kind in CAUSAL:
            torch.testing.assert_close(ar_nll(model, ids, target, batch_size=size), ar_nll(model, ids, target))


@pytest.mark.parametrize("kind", MODELS)
def test_estimates_repeat_by_seed_and_differ_by_draw_and_row(kind: str) -> None:
    model, ids, target = ragged(kind)
    ids, target = ids[:1].expand(6, -1), target[:1].expand(6, -1)
    state, whole = torch.get_rng_state(), {"block_size": None, "seeds": False}
    one, again, other = (bound(model, ids, target, samples=5, seed=seed, **whole) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert len(torch.cat([one, other]).flatten().unique()) > 40  # of 60 draws on one and the same text


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_behind_the_targets_is_seen(kind: str) -> None:
    model, ids, target = ragged(kind)
    behind = torch.arange(12) > 11 - target.flip(1).long().argmax(1, keepdim=True)
    assert behind.sum() > 10
    other = torch.where(behind, (ids + 1) % TOY, ids)
    assert torch.equal(bound(model, ids, target, **law_of(kind)), bound(model, other, target, **law_of(kind)))
    if kind in CAUSAL:
        assert torch.equal(ar_nll(model, ids, target), ar_nll(model, other, target))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("all_at_once", [True, False])
def test_a_text_has_one_likelihood_wherever_the_row_ends(kind: str, all_at_once: bool) -> None:
    """A place behind the text is no place: the same expectation with and without padding."""
    model, (ids, target), (longer, target_too) = toy(kind, 2), all_texts((1, 0)), all_texts((1, 0), behind=(2, 2, 0))
    size = None if all_at_once or kind.startswith("full") else 2
    seeds = kind in CAUSAL and size is not None
    Estimate(model, longer, target_too, size, seeds, samples=15).check(Law(model, ids, target, size, seeds))


# --- Texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 5, 8, 50])
def test_slices_score_every_token_once(length: int) -> None:
    documents = [list(range(100, 100 + n)) for n in (0, 1, 2, 4, 7, 8, 14, 21)]
    ids, target = slices(documents, length, begin=1)
    assert ids.shape == target.shape
    assert ids.shape[1] == length
    scored = ids[target].tolist()
    assert scored == [token for document in documents for token in document]
    assert not target[:, 0].any()
    for row, goal in zip(ids.tolist(), target.tolist(), strict=True):
        count = sum(goal)
        assert goal == [False] + [True] * count + [False] * (length - 1 - count)
        assert row[count + 1 :] == [1] * (length - 1 - count)
        # What is given is the token before, or the begin of a document.
        assert row[0] == (1 if row[1] == 100 else row[1] - 1)


def test_slices_by_hand() -> None:
    ids, target = slices([[5, 6, 7, 8], [9]], 3, begin=1)
    assert ids.tolist() == [[1, 5, 6], [6, 7, 8], [1, 9, 1]]
    assert target.tolist() == [[False, True, True], [False, True, True], [False, True, False]]


def test_bits_per_byte_by_hand() -> None:
    found = Likelihood(
        name="x", law="ar", nats=6 * math.log(2), standard_error=math.log(2), tokens=3, size=12, bound=False
    )
    assert found.bits_per_byte == pytest.approx(0.5)
    assert found.nats_per_token == pytest.approx(2 * math.log(2))
    assert found.record() == {
        "name": "x", "law": "ar", "bits_per_byte": pytest.approx(0.5), "nats_per_token": pytest.approx(2 * math.log(2)),
        "bound": False, "standard_error": pytest.approx(1 / 12),
    }  # fmt: skip


def test_a_model_that_knows_nothing_needs_all_bits() -> None:
    """Uniform over three tokens: ln 3 a token in every law, without error."""
    model, ids, target = ragged("causal")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = int(target.sum())
    found = score(model, Text(ids=ids, target=target, size=2 * tokens), block_sizes=(1, 3))
    assert [entry.nats_per_token for entry in found[:2]] == pytest.approx([math.log(3)] * 2)
    assert [entry.bits_per_byte for entry in found[:2]] == pytest.approx([math.log2(3) / 2] * 2)
    assert [entry.standard_error for entry in found[:2]] == [0, 0]
    # The masked terms n/m * m * ln 3 = n ln 3 do not vary either.
    assert [entry.nats_per_token for entry in found[2:]] == pytest.approx([math.log(3)] * 2)
    assert [entry.standard_error for entry in found[2:]] == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "laws"),
    [
        ("causal", [("ar", False), ("block", True), ("block", True), ("diffusion", True)]),
        ("full", [("diffusion", True)]),
        ("block", [("block", True), ("diffusion", True)]),
    ],
)
def test_a_model_is_scored_by_every_law_that_it_has(kind: str, laws: list[tuple[str, bool]]) -> None:
    model, ids, target = ragged(kind)
    sizes = (3,) if kind == "block" else (2, 3)
    found = score(model, Text(ids=ids, target=target, size=1000), block_sizes=sizes, samples=4)
    assert [(entry.law, entry.bound) for entry in found] == laws
    assert len({entry.name for entry in found}) == len(found)
    for entry in found:
        assert entry.tokens == target.sum()
        assert entry.size == 1000
    draws = bound(model, ids, target, block_size=None, seeds=False, samples=4)
    last = found[-1]
    assert last.nats == pytest.approx(float(draws.sum() / 4))
    # The rows are independent, and each mean of four draws has a quarter of their variance.
    by_hand = math.sqrt(sum(sum((x - sum(row) / 4) ** 2 for x in row) / 3 / 4 for row in draws.T.tolist()))
    assert last.standard_error == pytest.approx(by_hand)
    if kind == "causal":
        assert found[0].nats == pytest.approx(float(ar_nll(model, ids, target).sum()))
        draws = bound(model, ids, target, block_size=3, seeds=True, samples=4)
        assert found[2].nats == pytest.approx(float(draws.sum() / 4))


def test_a_pure_left_to_right_model_has_one_law() -> None:
    ids, target = all_texts()
    model = toy("causal", vocab_size=TOY, mask_token_id=None)
    (only,) = score(model, Text(ids=ids, target=target, size=1), block_sizes=(1, 2))
    assert (only.law, only.bound, only.standard_error) == ("ar", False, 0)


# --- Complaints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("causal", {"target": torch.ones(1, 5, dtype=torch.bool)}, "target: .*first token"),
        ("causal", {"target": torch.zeros(1, 5, dtype=torch.bool)}, "target: a row without"),
        ("causal", {"target": torch.ones(1, 4, dtype=torch.bool)}, r"shape \(1, 5\).*\(1, 4\)"),
        ("causal", {"ids": torch.zeros(5, dtype=torch.int64), "target": torch.ones(5) > 0}, r"\[B, T\]"),
        ("short", {}, "rows have 5 tokens.*max_position_embeddings is 4.*slices"),
        ("pure", {}, "mask_token_id is None.*ar_nll"),
        ("block", {"seeds": True, "block_size": 2}, "seeds: .*'block'"),
        ("full", {"seeds": True}, "seeds: .*'full'"),
        ("full", {"block_size": 2}, "block_size: .*'full'"),
        ("block", {"block_size": 3}, "block_size: .*grid of 2"),
    ],
)
def test_what_cannot_be_scored_is_an_error(kind: str, change: dict[str, Any], said: str) -> None:
    models = {"short": {"max_position_embeddings": 4}, "pure": {"mask_token_id": None}}
    model = toy("causal", **models[kind]) if kind in models else toy(kind)
    given: dict[str, Any] = {
        "ids": torch.zeros(1, 5, dtype=torch.int64), "target": torch.tensor([[False, True, True, True, True]]),
        "block_size": None, "seeds": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=said):
        bound(model, **{**given, **change})


@pytest.mark.parametrize("kind", ["block", "full"])
def test_only_causal_clean_text_has_a_left_to_right_likelihood(kind: str) -> None:
    with pytest.raises(ValueError, match=f"clean_attention='{kind}'.*bound"):
        ar_nll(toy(kind), *all_texts())


@pytest.mark.parametrize("samples", [1, 0, -1])
def test_one_draw_has_no_standard_error(samples: int) -> None:
    model, ids, target = ragged("causal")
    with pytest.raises(ValueError, match=f"samples is {samples}"):
        score(model, Text(ids=ids, target=target, size=9), samples=samples)
