"""Block models left to right: with blocks of one they verify themselves (S2D2, arXiv 2603.25702)."""

from itertools import product
from typing import Any

import pytest
import torch
from arrivals import adapter_of
from chances import CALLS, LENGTH, MASK, PROMPT, drawn, p_value
from oracles import padded, said, texts, tiny

from hybrid import HybridForCausalLM
from hybrid.sampling import Request, decode_all

PREDICTIONS = pytest.mark.parametrize("prediction", ["in_place", "next"])
SPECULATION: list[dict[str, Any]] = [
    {}, {"block_size": 3}, {"block_size": 9}, {"fused": True}, {"drafts_per_round": 2, "confidence_threshold": 0.3},
]  # fmt: skip


def block_model(prediction: str, seed: int = 0, **fields: Any) -> HybridForCausalLM:
    return tiny(seed, clean_attention="block", diffusion_prediction=prediction, **{"peaked": 0.4, **fields})


@PREDICTIONS
@pytest.mark.parametrize("options", [{"mode": "ar"}, *({"mode": "speculative", **own} for own in SPECULATION)], ids=str)
def test_tokens_are_those_of_blocks_of_one(prediction: str, options: dict[str, Any]) -> None:
    model = block_model(prediction)
    one = block_model(prediction, block_size=1)
    one.load_state_dict(model.state_dict())
    rows = texts(3, [1, 4, 9, 6])
    ids, mask = padded(rows, "holes")
    want = one.generate(ids, mask, mode="block", max_new_tokens=21)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=21, **options), want)
    alone, _ = decode_all(model, rows, slots=1, max_new_tokens=21, **options)
    chunked, _ = decode_all(model, rows, slots=3, prefill=2, max_new_tokens=21, **options)
    assert [done.tokens for done in alone] == [done.tokens for done in chunked] == want[:, ids.shape[1] :].tolist()


@pytest.mark.one_in(4)
@PREDICTIONS
@pytest.mark.parametrize("fused", [False, True])
@CALLS
def test_sampled_tokens_have_the_law_of_blocks_of_one(prediction: str, fused: bool, calls: int) -> None:
    model = block_model(prediction, 10, peaked=0.0, dtype=torch.float32, vocab_size=MASK + 1, mask_token_id=MASK)
    law = {}
    for text in product(range(MASK), repeat=LENGTH):
        chances = [said(model, [*PROMPT, *text[:i]]).double().softmax(0)[token] for i, token in enumerate(text)]
        law[text] = float(torch.stack(chances).prod())
    assert abs(sum(law.values()) - 1) < 1e-6
    options: dict[str, Any] = {"mode": "speculative", "block_size": 3, "fused": fused}
    assert p_value(drawn(model, calls, temperature=1.0, **options)[0], law) > 1e-3
    assert p_value(drawn(model, calls=1, temperature=1.0, mode="block", confidence_threshold=0.1)[0], law) < 1e-6


@PREDICTIONS
def test_an_adapter_changes_drafts_and_no_text(prediction: str) -> None:
    model, rows = block_model(prediction), texts(4, [3, 8])
    options: dict[str, Any] = {"mode": "speculative", "block_size": 4, "max_new_tokens": 24}
    exact, _ = decode_all(model, rows, mode="ar", max_new_tokens=24)
    plain, _ = decode_all(model, rows, **options)
    adapted, _ = decode_all(model, rows, draft_adapter=adapter_of(model), **options)
    assert [done.tokens for done in plain] == [done.tokens for done in adapted] == [done.tokens for done in exact]
    assert [done.stats.accepted for done in plain] != [done.stats.accepted for done in adapted]


@PREDICTIONS
def test_a_row_sampled_in_company_is_the_row_alone(prediction: str) -> None:
    model = block_model(prediction)
    asks = [Request(ids, seed=i, temperature=1.4) for i, ids in enumerate(texts(5, [2, 7, 1, 3]))]
    options: dict[str, Any] = {"mode": "speculative", "max_new_tokens": 14}
    together, _ = decode_all(model, asks, slots=3, **options)
    for ask, done in zip(asks, together, strict=True):
        assert decode_all(model, [ask], **options)[0][0].tokens == done.tokens


@PREDICTIONS
def test_a_cache_goes_on_where_text_sees_itself_alike(prediction: str) -> None:
    model, ids = block_model(prediction), torch.tensor(texts(2, [9]))
    first: Any = model.generate(ids, mode="ar", max_new_tokens=5, return_dict_in_generate=True)
    further: dict[str, Any] = {"mode": "speculative", "max_new_tokens": 9}
    again = model.generate(first.sequences, past_key_values=first.past_key_values, **further)
    assert torch.equal(again, model.generate(first.sequences, **further))
    with pytest.raises(ValueError, match="past_key_values was made by a mode"):
        model.generate(again, mode="block", past_key_values=first.past_key_values)
    blocks: Any = model.generate(ids, mode="block", max_new_tokens=5, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="past_key_values was made by a mode"):
        model.generate(blocks.sequences, mode="ar", past_key_values=blocks.past_key_values)


def test_what_does_not_go_with_it_is_refused() -> None:
    model, ids = block_model("in_place"), torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="clean_attention"):
        model.generate(ids, mode="ar", num_beams=2)
