"""Sampled tokens follow the law that they claim: checked against the enumerated law of whole texts."""

from itertools import permutations, product
from typing import Any

import pytest
import torch
from chances import CALLS, LENGTH, MASK, PROMPT, Law, drawn, next_law, p_value, text_law
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import clean_labels, raw_logits, tiny
from torch import Tensor
from transformers import TopPLogitsWarper

import hybrid.sampling.schemes as schemes
import hybrid.sampling.schemes.speculation as speculation
from hybrid import HybridForCausalLM
from hybrid.sampling.choosing.choice import sample
from hybrid.sampling.reveal import Canvas
from hybrid.sampling.row import Row

WARPS: dict[str, dict[str, float]] = {
    "cold": {"temperature": 0.7},
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.3},
    "nucleus": {"temperature": 1.0, "top_p": 0.9},
}

def three_words(prediction: str = "in_place") -> HybridForCausalLM:
    """A vocabulary of three tokens and the mask, and logits that lie 1 or 2 apart."""
    return tiny(10, dtype=torch.float32, vocab_size=4, mask_token_id=MASK, diffusion_prediction=prediction)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("warp", WARPS)
@CALLS
def test_ar_samples_its_own_law(warp: str, calls: int) -> None:
    model = three_words()
    law = text_law(model, **WARPS[warp])
    found, _ = drawn(model, calls, **WARPS[warp])
    assert sum(chance > 1e-3 for chance in law.values()) > 15
    assert p_value(found, law) > 1e-3


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("warp", "block_size", "prediction", "fused"),
    [
        ("plain", 4, "next", False),
        ("nucleus", 3, "next", False),
        ("plain", 3, "in_place", True),
        ("nucleus", 4, "in_place", True),
        pytest.param("cold", 3, "in_place", False, marks=pytest.mark.slow),
        pytest.param("hot", 4, "in_place", False, marks=pytest.mark.slow),
        pytest.param("cold", 4, "next", True, marks=pytest.mark.slow),
        pytest.param("hot", 3, "next", True, marks=pytest.mark.slow),
    ],
)
@CALLS
def test_speculation_samples_the_law_of_ar(
    warp: str, block_size: int, prediction: str, fused: bool, calls: int
) -> None:  # fmt: skip
    model = three_words(prediction)
    found, stats = drawn(model, calls, mode="speculative", block_size=block_size, fused=fused, **WARPS[warp])
    accepted = {n for row in stats.rows for n in row.accepted}
    assert accepted == {n + (not fused) for n in range(1, block_size + 1)}  # drafts fall anywhere
    assert p_value(found, text_law(model, **WARPS[warp])) > 1e-3


RIGHT = speculation.verify_sampled


def keep_all(draft: list[int], q: Tensor, p: Tensor, uniform: list[float]) -> tuple[int, int]:
    """Every draft is accepted."""
    return len(draft), int(sample(p[-1], torch.tensor(uniform[-1], dtype=torch.float64)))


def bonus_from_the_whole_law(draft: list[int], q: Tensor, p: Tensor, uniform: list[float]) -> tuple[int, int]:
    """Where a draft falls, the next token is drawn from p instead of what p has more than q."""
    n, _ = RIGHT(draft, q, p, uniform)
    return n, int(sample(p[n], torch.tensor(uniform[-1], dtype=torch.float64)))


def forget_the_draft_law(draft: list[int], q: Tensor, p: Tensor, uniform: list[float]) -> tuple[int, int]:
    """Verification believes that drafts were drawn uniformly."""
    return RIGHT(draft, torch.full_like(q, 1 / MASK), p, uniform)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mutant", [keep_all, bonus_from_the_whole_law, forget_the_draft_law])
def test_a_wrong_law_would_be_noticed(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "verify_sampled", mutant)
    model = three_words()
    found, _ = drawn(model, calls=1, mode="speculative", block_size=3, temperature=1.0)
    assert p_value(found, text_law(model, temperature=1.0)) < 1e-6


def from_the_right(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each draft is drawn in sight of what comes after it."""
    return canvas.show(canvas.hidden & (canvas.hidden.flip(1).cumsum(1).flip(1) == 1))


def changing_its_mind() -> HybridForCausalLM:
    """Three words of a model whose drafts depend on one another."""
    return tiny(11, dtype=torch.float32, vocab_size=4, mask_token_id=MASK)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (changing_its_mind(), {"reveal": from_the_right}),
        (changing_its_mind(), {"drafts_per_round": 2, "reveal": "random"}),
        (three_words("next"), {"confidence_threshold": 0.6}),
    ],
    ids=["from the right", "two drafts", "threshold"],
)
@CALLS
def test_several_drafts_sample_the_law_of_ar(model: HybridForCausalLM, rule: dict[str, Any], calls: int) -> None:
    found, stats = drawn(model, calls, mode="speculative", block_size=4, temperature=1.3, **rule)
    assert sum(row.draft for row in stats.rows) > 1.2 * sum(row.settle for row in stats.rows)
    assert {n for row in stats.rows for n in row.accepted} == {1, 2, 3, 4}
    assert p_value(found, text_law(model, temperature=1.3)) > 1e-3


def by_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are accepted as if all had been drawn at once: with min(1, p / q), q being the law when each was shown."""
    laws: dict[Row, dict[int, Tensor]] = {}
    judged: list[Row] = []
    show, settle = schemes.reveal, speculation.Linear.settled

    def noting(rows: list[Row], slots: list[list[int]], logits: Tensor) -> None:
        show(rows, slots, logits)
        for row, own, part in zip(rows, slots, logits.split([len(s) for s in slots]), strict=True):
            assert row.plan.warp is not None
            q = dict(zip(own, row.plan.warp.law(part), strict=True))
            laws.setdefault(row, {}).update({slot: law for slot, law in q.items() if not row.hidden[slot]})

    def settled(scheme: Any, answer: schemes.Answer) -> Any:
        judged.extend(answer.rows)
        return settle(scheme, answer)

    def ratio(draft: list[int], p: Tensor, uniform: list[float]) -> tuple[int, int]:
        q = laws[judged.pop(0)]
        # What is behind the limit was not drafted, and its verdict is nobody's.
        nothing = torch.full_like(p[0], 1 / MASK)
        return RIGHT(draft, torch.stack([q.get(i + 1, nothing) for i in range(len(draft))]), p, uniform)

    monkeypatch.setattr(schemes, "reveal", noting)
    monkeypatch.setattr(speculation.Linear, "settled", settled)
    monkeypatch.setattr(speculation, "verify_fresh", ratio)


def keep_what_was_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is accepted."""
    monkeypatch.setattr(speculation, "verify_fresh", lambda draft, p, uniform: keep_all(draft, p, p, uniform))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mutant", [by_ratio, keep_what_was_shown])
def test_a_wrong_law_of_several_drafts_would_be_noticed(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    model = changing_its_mind()
    found, _ = drawn(model, calls=1, mode="speculative", block_size=4, temperature=1.3, reveal=from_the_right)
    assert p_value(found, text_law(model, temperature=1.3)) < 1e-6


def order_law(model: HybridForCausalLM, temperature: float = 1.0) -> Law:
    """The law of a masked diffusion: one slot after the other, in each of the 24 orders with the same probability."""
    after: dict[tuple[int, ...], list[list[float]]] = {}
    for seen in product(range(MASK + 1), repeat=LENGTH):  # MASK: not shown yet
        whole = [*PROMPT, *seen]
        logits = raw_logits(model, whole, clean_labels(model, len(whole)))[len(PROMPT) :]
        after[seen] = [next_law(row, temperature) for row in logits]
    law = dict.fromkeys(product(range(MASK), repeat=LENGTH), 0.0)
    orders = list(permutations(range(LENGTH)))
    for text in law:
        for order in orders:
            seen, chance = [MASK] * LENGTH, 1.0
            for slot in order:
                chance *= after[tuple(seen)][slot][text[slot]]
                seen[slot] = text[slot]
            law[text] += chance / len(orders)
    assert abs(sum(law.values()) - 1) < 1e-9
    return law


def any_order_model() -> HybridForCausalLM:
    """One whose slots depend on one another."""
    return tiny(3, dtype=torch.float32, vocab_size=4, mask_token_id=MASK, clean_attention="full", peaked=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"reveal": "first_hitting"}, {"reveal": "ancestral", "steps_per_block": 1024}], ids=["hit", "ancestral"]
)
def test_random_orders_sample_the_law_of_the_diffusion(options: dict[str, Any]) -> None:
    """A hundred thousand texts; ancestral steps that show nothing cost no forward."""
    model = any_order_model()
    found, stats = drawn(model, calls=25, mode="diffusion", temperature=1.0, **options)
    assert found.total() > 100_000 and p_value(found, order_law(model)) > 1e-3
    assert stats.draft <= LENGTH


def test_all_tokens_at_once_would_be_noticed() -> None:
    model = any_order_model()
    found, _ = drawn(model, calls=2, mode="diffusion", temperature=1.0, steps_per_block=1)
    assert p_value(found, order_law(model)) < 1e-6


@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_the_nucleus_is_transformers_own(top_p: float) -> None:
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    kept = TopPLogitsWarper(top_p)(None, logits).isfinite()
    assert kept.tolist() == [[p > 0 for p in next_law(row, 1.0, top_p)] for row in logits]


# --- One draw -------------------------------------------------------------------------------------

BELOW_ONE = 1 - 2**-53
weight = st.one_of(st.just(0.0), st.floats(0, 1), st.sampled_from([5e-324, 1e-300, 1e-30, 1e30]))
quantile = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 2**-53, BELOW_ONE]))


@settings(derandomize=True, max_examples=500)
@given(st.lists(weight, min_size=1, max_size=6).filter(any), quantile)
def test_a_draw_is_the_token_at_its_quantile_and_never_impossible(
    weights: list[float], uniform: float
) -> None:
    token = int(sample(*(torch.tensor(x, dtype=torch.float64) for x in (weights, uniform))))
    assert weights[token] > 0
    below, total = sum(weights[:token]), sum(weights)
    slack = 1e-12 * total + 1e-323
    assert below - slack <= uniform * total <= below + weights[token] + slack


def test_draws_at_the_edges() -> None:
    weights = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for uniform, token in {0.0: 1, 0.2499: 1, 0.25: 3, 0.7499: 3, 0.75: 4, BELOW_ONE: 4}.items():
        assert sample(weights, torch.tensor(uniform, dtype=torch.float64)) == token
    # A tail below float32's resolution is still there.
    tail = torch.tensor([1.0] + [1e-9] * 1000)
    assert sample(tail, torch.tensor(1 - 5e-7, dtype=torch.float64)) > 0
    certain = torch.nn.functional.one_hot(torch.arange(4)).double()
    for uniform in (0.0, 0.5, BELOW_ONE):
        assert sample(certain, torch.full((4,), uniform, dtype=torch.float64)).tolist() == [0, 1, 2, 3]
