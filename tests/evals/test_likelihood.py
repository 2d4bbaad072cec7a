"""Likelihoods against everything there is: a toy vocabulary, all texts of a length, all masks and all orders."""

import math
from typing import Any

import pytest
import torch
from enumerated import CAUSAL, FREE, MODELS, SEEDED, TOY, Law, all_texts, left_to_right, toy
from oracles import texts, tiny
from scipy.stats import chisquare
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.evals.likelihood import (
    Likelihood,
    Text,
    ar_nll,
    bound,
    score,
    slices,
    text_of,
    tokenized,
    written_nll,
)
from hybrid.evals.passes.outputs import Prompt
from hybrid.training.text.tokenizing import character_tokenizer

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


def test_what_was_written_is_scored_left_to_right() -> None:
    """Outputs of unequal length in any mode, against a slow pass over each alone."""
    model = toy("causal", 1)
    prompts = texts(3, [4, 1, 6, 2, 3], TOY)
    outputs = texts(4, [5, 1, 0, 7, 2], TOY)
    slow = [
        sum(float(left_to_right(model, torch.tensor([p + o]), i)) for i in range(len(p), len(p) + len(o)))
        for p, o in zip(prompts, outputs, strict=True)
    ]
    for size in (1, 2, 32):
        found = written_nll(model, prompts, outputs, batch_size=size)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(slow, abs=1e-10)
    assert found[2] == 0 and found[3] > 1
    # Where rows end in what happens to be the mask token, too.
    low = toy("causal", 1, mask_token_id=0)
    given, new = [[1, 2], [3]], [[2], [1, 3, 2]]
    alone = [written_nll(low, [p], [o]) for p, o in zip(given, new, strict=True)]
    torch.testing.assert_close(written_nll(low, given, new), torch.cat(alone), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="outputs: there are 4, and 5 prompts"):
        written_nll(model, prompts, outputs[1:])
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        written_nll(model, [[1], []], [[1], [2]])


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
    ("causal", None, True), ("normed", 3, True), ("block", 2, False), ("block", 3, False),
    *(("block, next", size, seeds) for size in (2, 3) for seeds in (True, False)), ("block, next", None, True),
]  # fmt: skip
GIVEN = [(0,), (1, 0, 2)]


class Estimate:
    """How far the draws of `bound` are off a law, in standard errors that the law itself gives."""

    def __init__(
        self, model: HybridForCausalLM, ids: Tensor, target: Tensor, size: int | None, seeds: bool, samples: int
    ) -> None:
        draws = bound(model, ids, target, block_size=size, seed_tokens=seeds, samples=samples, seed=3, batch_size=81)
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


@pytest.mark.one_in(3)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(("kind", "size", "seeds"), LAWS)
def test_the_bound_is_the_enumerated_one(kind: str, size: int | None, seeds: bool, given: tuple[int, ...]) -> None:
    model, (ids, target) = toy(kind, 2, block_size=size or 2), all_texts(given)
    law = Law(model, ids, target, size, seeds)
    Estimate(model, ids, target, size, seeds, samples=15).check(law)
    assert (law.expectation() >= law.exact() - 1e-12).all()
    assert float((-law.exact()).exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("given", GIVEN)
def test_blocks_of_one_with_seeds_are_exactly_left_to_right(kind: str, given: tuple[int, ...]) -> None:
    model, (ids, target) = toy(kind, 4), all_texts(given)
    draws = bound(model, ids, target, block_size=1, seed_tokens=True, samples=3)
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


@pytest.mark.parametrize("given", [(0,), (1, 0), (1, 0, 2)])
def test_seeds_of_blocks_on_a_grid_are_told_from_none(given: tuple[int, ...]) -> None:
    """Where the first window has known tokens, and where it begins with what is scored."""
    model, (ids, target) = toy("block, next", 2, block_size=3), all_texts(given)
    law, found = Law(model, ids, target, 3, True), Estimate(model, ids, target, 3, True, samples=60)
    assert found.off(law, law.expectation()) < 4
    assert found.off(law, Law(model, ids, target, 3, False).expectation()) > 8


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


# --- The law of a bound is the one that decoding samples ------------------------------------------------------


def drawn(model: HybridForCausalLM, given: tuple[int, ...], size: int) -> Tensor:
    """int64 `[81]`: how often `generate` wrote each of `all_texts(given)`, one slot at a time in any order."""
    rows = torch.tensor([given] * 8192)
    found = model.generate(
        rows, mode="block", block_size=size, reveal="first_hitting", do_sample=True, temperature=1.0,
        max_new_tokens=FREE, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert isinstance(found, Tensor)
    digits = TOY ** torch.arange(FREE - 1, -1, -1)
    return (found[:, len(given) :] * digits).sum(1).bincount(minlength=TOY**FREE)


def p_value(counts: Tensor, nats: Tensor) -> float:
    """Of the chi-square test against -log p of every text; texts expected fewer than five times count together."""
    expected = (-nats).exp() * counts.sum()
    rare = expected < 5
    pairs = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.double(), expected)]
    kept = pairs[1] > 0
    return float(chisquare(*(x[kept].numpy() for x in pairs)).pvalue)


# Windows that end with the text: one that it cuts short is drafted at full size, and scored as the shorter one.
DECODED = [
    ("causal", 4, (1,)), ("causal, next", 2, (1, 0, 2)), ("block", 3, (1, 0)), ("block, next", 5, (1,)),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("block", 4, (1, 0, 2, 1)), ("block, next", 3, (1, 0)), ("block, next", 4, (1, 0, 2, 1)),
    )),
]  # fmt: skip


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("kind", "size", "given"), DECODED)
def test_decoding_samples_the_law_that_the_bound_is_of(kind: str, size: int, given: tuple[int, ...]) -> None:
    model, (ids, target) = toy(kind, 2, block_size=size), all_texts(given)
    counts, seeds = drawn(model, given, size), kind in SEEDED
    law, other = (Law(model, ids, target, size, has).exact() for has in (seeds, not seeds))
    assert p_value(counts, law) > 1e-3
    # They are one law where no window begins behind whole blocks.
    assert torch.equal(law, other) if (size, given) == (5, (1,)) else p_value(counts, other) < 1e-6


def test_a_window_with_known_tokens_has_no_seed() -> None:
    """The clean text of a block that is not whole would say something else of what follows it."""
    model, given, (ids, target) = toy("block, next", 2, block_size=3), (1, 0), all_texts((1, 0))
    law, counts = Law(model, ids, target, 3, True), drawn(toy("block, next", 2, block_size=3), given, 3)
    assert law.windows[0].open == [2]
    seeded = law.exact() - law.windows[0].orders()[0] + left_to_right(model, ids, 2)
    assert float((-seeded).exp().sum()) == pytest.approx(1, abs=1e-12)
    assert p_value(counts, seeded) < 1e-6 < 1e-3 < p_value(counts, law.exact())


# --- What an estimate depends on ----------------------------------------------------------------------------


def ragged(kind: str) -> tuple[HybridForCausalLM, Tensor, Tensor]:
    """Rows whose targets begin and end at different places."""
    ids = torch.tensor(texts(6, [12] * 7, TOY))
    place = torch.arange(12)
    first, last = torch.tensor([1, 3, 2, 7, 1, 5, 4])[:, None], torch.tensor([11, 9, 2, 11, 6, 8, 11])[:, None]
    return toy(kind, 5, block_size=3), ids, (place >= first) & (place <= last)


def law_of(kind: str) -> dict[str, Any]:
    return {"block_size": None if kind.startswith("full") else 3, "seed_tokens": kind in SEEDED}


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
    state, whole = torch.get_rng_state(), {"block_size": None, "seed_tokens": False}
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
    seeds = kind in SEEDED and size is not None
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
    assert found.record().plain() == {
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
        ("causal", [("ar", False), ("block", True), ("block", True), ("masked", True)]),
        ("full", [("masked", True)]),
        ("block", [("block", True), ("masked", True)]),
        ("block, next", [("block", True), ("masked", True)]),
    ],
)
def test_a_model_is_scored_by_every_law_that_it_has(kind: str, laws: list[tuple[str, bool]]) -> None:
    model, ids, target = ragged(kind)
    sizes = (3,) if kind.startswith("block") else (2, 3)
    found = score(model, Text(ids=ids, target=target, size=1000), block_sizes=sizes, samples=4)
    assert [(entry.law, entry.bound) for entry in found] == laws
    assert len({entry.name for entry in found}) == len(found)
    for entry in found:
        assert entry.tokens == target.sum()
        assert entry.size == 1000
    draws = bound(model, ids, target, block_size=None, seed_tokens=False, samples=4)
    last = found[-1]
    assert last.nats == pytest.approx(float(draws.sum() / 4))
    # The rows are independent, and each mean of four draws has a quarter of their variance.
    by_hand = math.sqrt(sum(sum((x - sum(row) / 4) ** 2 for x in row) / 3 / 4 for row in draws.T.tolist()))
    assert last.standard_error == pytest.approx(by_hand)
    if kind == "causal":
        assert found[0].nats == pytest.approx(float(ar_nll(model, ids, target).sum()))
    if kind in SEEDED:
        draws = bound(model, ids, target, block_size=3, seed_tokens=True, samples=4)
        assert found[-2].nats == pytest.approx(float(draws.sum() / 4))


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
        ("block", {"seed_tokens": True, "block_size": 2}, "seed_tokens: .*'block'"),
        ("full", {"seed_tokens": True}, "seed_tokens: .*'full'"),
        ("full, next", {"seed_tokens": True}, "seed_tokens: .*'full' with diffusion_prediction='next'"),
        ("full", {"block_size": 2}, "block_size: .*'full'"),
        ("block", {"block_size": 3}, "block_size: .*grid of 2"),
    ],
)
def test_what_cannot_be_scored_is_an_error(kind: str, change: dict[str, Any], said: str) -> None:
    models = {"short": {"max_position_embeddings": 4}, "pure": {"mask_token_id": None}}
    model = toy("causal", **models[kind]) if kind in models else toy(kind)
    given: dict[str, Any] = {
        "ids": torch.zeros(1, 5, dtype=torch.int64), "target": torch.tensor([[False, True, True, True, True]]),
        "block_size": None, "seed_tokens": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=said):
        bound(model, **{**given, **change})


@pytest.mark.parametrize("kind", ["block", "full"])
def test_only_causal_clean_text_has_a_left_to_right_likelihood(kind: str) -> None:
    with pytest.raises(ValueError, match=f"clean_attention='{kind}'.*bound"):
        ar_nll(toy(kind), *all_texts())


def test_orders_tighten_every_bound_of_a_score() -> None:
    model, ids, target = ragged("causal")
    text = Text(ids=ids, target=target, size=1000)
    plain, single, tight = (score(model, text, block_sizes=(3,), samples=4, orders=k) for k in (0, 1, 8))
    assert [entry.name for entry in tight] == [
        "left to right, exact", "blocks of 3, bound", "blocks of 3, bound of 8 orders", "all at once, bound",
        "all at once, bound of 8 orders",
    ]  # fmt: skip
    assert [entry.nats for entry in plain] == [tight[i].nats for i in (0, 1, 3)]
    for loose, close in ((single[2], tight[2]), (single[4], tight[4])):
        assert close.law == loose.law and close.bound
        assert close.nats < loose.nats - 2 * math.hypot(loose.standard_error, close.standard_error)
    with pytest.raises(ValueError, match="orders is -1"):
        score(model, text, orders=-1)


@pytest.mark.parametrize("samples", [1, 0, -1])
def test_one_draw_has_no_standard_error(samples: int) -> None:
    model, ids, target = ragged("causal")
    with pytest.raises(ValueError, match=f"samples is {samples}"):
        score(model, Text(ids=ids, target=target, size=9), samples=samples)


def test_texts_without_anything_to_score_are_refused() -> None:
    model, tokenizer = tiny(), character_tokenizer("ab")
    with pytest.raises(ValueError, match="there is nothing to score"):
        tokenized(tokenizer, [], length=4, begin=0)
    with pytest.raises(ValueError, match="no prompt has a target"):
        text_of(tokenizer, [Prompt(ids=[1], text="a", target="")], model)
    long = Prompt(ids=[1], text="a", target="ab" * model.config.max_position_embeddings)
    with pytest.raises(ValueError, match="tokens, more than the model's context"):
        text_of(tokenizer, [long], model)
