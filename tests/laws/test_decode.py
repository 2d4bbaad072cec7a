"""What holds of every decoded text, whatever the model, the mode, the batch and the padding."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import COMBINATIONS, MASK, continuations, generators, padded, slowly, texts, tiny
from torch import Tensor

import hybrid.cache
import hybrid.parts
import hybrid.sampling.schemes.speculation as speculation
from hybrid import HybridForCausalLM, KVCache

LENGTHS = [7, 1, 4, 8]  # unequal, on and off the grid of blocks, and a single token
PATTERNS = ["left", "right", "holes"]
SAMPLED = {"do_sample": True, "temperature": 1.2, "top_p": 0.95}

every_mode = pytest.mark.parametrize(("mode", "clean", "prediction"), COMBINATIONS)


def model_for(clean: str, prediction: str, seed: int = 0) -> HybridForCausalLM:
    return tiny(seed, peaked=0.4, clean_attention=clean, diffusion_prediction=prediction)


def options_for(mode: str, reveal: str = "threshold") -> dict[str, Any]:
    """With reveal rules that show several tokens at once, and not always equally many."""
    if mode == "ar" or (mode == "speculative" and reveal == "threshold"):
        return {}
    return {"confidence_threshold": 0.4} if reveal == "threshold" else {"steps_per_block": 3}


def decode(
    model: HybridForCausalLM, ids: Tensor, real: Tensor | None = None, **options: Any
) -> list[list[int]]:
    """New tokens of every row."""
    output = model.generate(ids, real, return_dict_in_generate=True, **options)
    return continuations(output, ids.shape[1])


# --- Speculation is lossless ----------------------------------------------------------------------


def small_model(seed: int) -> HybridForCausalLM:
    """One of many shapes; every second one repeats itself, so that drafts are accepted at all lengths."""
    return tiny(
        seed, dtype=torch.float32, peaked=(0.0, 0.3, 0.0, 0.6)[seed % 4], vocab_size=16 + seed % 3 * 12,
        mask_token_id=3, num_hidden_layers=1 + (seed % 3 == 0), hidden_size=16 + seed % 2 * 16,
        initializer_range=0.3 + seed % 3 * 0.1, block_size=2 + seed % 5,
        diffusion_prediction=("in_place", "next")[seed // 4 % 2], qk_norm=seed % 7 == 0,
        attention_bias=seed % 5 == 0, tie_word_embeddings=seed % 11 == 0,
    )  # fmt: skip


def small_prompts(seed: int) -> tuple[Tensor, Tensor]:
    rows = [[token if token != 3 else 4 for token in row] for row in texts(seed, [3, 9, 1, 6], vocabulary=16)]
    return padded(rows, PATTERNS[seed % 3], seed)


@pytest.mark.parametrize("models", [20, pytest.param(250, marks=pytest.mark.slow)])  # the slow one has a thousand rows
@pytest.mark.parametrize("fused", [False, True])
def test_speculation_changes_no_token(fused: bool, models: int) -> None:
    differ, accepted = 0, []
    for seed in range(models):
        model, (ids, real) = small_model(seed), small_prompts(seed)
        exact = decode(model, ids, real, max_new_tokens=24)
        options = {"mode": "speculative", "fused": fused, "max_new_tokens": 24, "return_dict_in_generate": True}
        output = model.generate(ids, real, block_size=model.config.block_size, **options)
        drafted = continuations(output, ids.shape[1])
        differ += sum(a != b for a, b in zip(exact, drafted, strict=True))
        accepted += [n for row in output.stats.rows for n in row.accepted]
    assert differ == 0
    root = not fused  # a round's first token needs no test
    assert sum(accepted) / len(accepted) > 1.1 + root
    assert set(accepted) == {root + n for n in range(1, 7)}  # windows are of 2 to 6: everything happens


def test_blocks_of_one_change_no_token() -> None:
    for seed in range(0, 250, 10):
        model, (ids, real) = small_model(seed), small_prompts(seed)
        single = decode(model, ids, real, max_new_tokens=24, mode="block", block_size=1)
        assert single == decode(model, ids, real, max_new_tokens=24)


def commit_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejected drafts stay in the cache."""
    right = KVCache.commit

    def wrong(cache: KVCache, n: list[int]) -> None:
        right(cache, [cache._written if x else 0 for x in n])

    monkeypatch.setattr(KVCache, "commit", wrong)


def commit_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last accepted token of a window is not in the cache."""
    right = KVCache.commit
    monkeypatch.setattr(KVCache, "commit", lambda cache, n: right(cache, [max(0, x - 1) for x in n]))


def emit_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the verifier wants another token, the draft is given out."""
    right = speculation.verify_greedy

    def wrong(draft: list[int], want: list[int]) -> tuple[int, int]:
        n, bonus = right(draft, want)
        return n, [*draft, bonus][n]

    monkeypatch.setattr(speculation, "verify_greedy", wrong)


def accept_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wrong draft is accepted too, and the verifier's word after it."""
    right = speculation.verify_greedy

    def wrong(draft: list[int], want: list[int]) -> tuple[int, int]:
        n = min(right(draft, want)[0] + 1, len(draft))
        return n, want[n]

    monkeypatch.setattr(speculation, "verify_greedy", wrong)


@pytest.mark.parametrize("mutant", [commit_everything, commit_short, emit_the_draft, accept_one_more])
@pytest.mark.parametrize("fused", [False, True])
def test_a_broken_speculation_would_be_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [(small_model(seed), small_prompts(seed)) for seed in range(8)]
    right = [decode(model, *prompts, max_new_tokens=24) for model, prompts in cases]
    mutant(monkeypatch)
    options: dict[str, Any] = {"max_new_tokens": 24, "mode": "speculative", "fused": fused}
    wrong = [decode(model, *prompts, **options) for model, prompts in cases]
    assert sum(a != b for a, b in zip(right, wrong, strict=True)) >= 6


# --- Rows -----------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@every_mode
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_row_is_what_slow_decoding_gives(mode: str, clean: str, prediction: str, pattern: str) -> None:
    """Batched, cached and padded, against one row and one full forward at a time."""
    model, rows = model_for(clean, prediction), texts(1, LENGTHS)
    new = decode(model, *padded(rows, pattern), mode=mode, max_new_tokens=11, **options_for(mode))
    assert new == [slowly(model, row, 11, mode, threshold=0.4) for row in rows]


@every_mode
def test_unequal_rows_looked_at_one_by_one_see_the_same(
    mode: str, clean: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows are of very different lengths, each has attention of its own, without the keys that it lacks."""
    calls: list[int] = []
    right = hybrid.parts._alone
    monkeypatch.setattr(hybrid.cache, "CALL", -1)
    monkeypatch.setattr(hybrid.parts, "_alone", lambda *given: calls.append(given[-1]) or right(*given))
    model, rows = model_for(clean, prediction), texts(1, LENGTHS)
    new = decode(model, *padded(rows, "left"), mode=mode, max_new_tokens=11, **options_for(mode))
    assert new == [slowly(model, row, 11, mode, threshold=0.4) for row in rows]
    assert bool(calls) == (clean != "full")


@pytest.mark.one_in(3)
@every_mode
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("reveal", ["threshold", "steps"])
def test_a_row_of_a_batch_is_the_row_alone(
    mode: str, clean: str, prediction: str, sampled: bool, reveal: str
) -> None:
    model, rows = model_for(clean, prediction, seed=2), texts(2, LENGTHS)
    options = {"mode": mode, "max_new_tokens": 10, "return_dict_in_generate": True, "eos_token_id": [2, 3]}
    options |= options_for(mode, reveal) | (SAMPLED if sampled else {})
    ids, real = padded(rows, "holes")
    batch = model.generate(ids, real, generator=generators(len(rows)), **options)
    new = continuations(batch, ids.shape[1])
    for i, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), generator=generators(len(rows))[i], **options)
        assert continuations(alone, len(row)) == [new[i]]
        assert alone.stats.rows == [batch.stats.rows[i]]


@every_mode
def test_the_input_comes_back_as_given(mode: str, clean: str, prediction: str) -> None:
    model = model_for(clean, prediction)
    for pattern in PATTERNS:
        ids, real = padded(texts(3, LENGTHS), pattern)
        given = ids.clone()
        sequences = model.generate(ids, real, mode=mode, max_new_tokens=3)
        assert torch.equal(ids, given)
        assert torch.equal(sequences[:, : ids.shape[1]], given)


@every_mode
@pytest.mark.parametrize("sampled", [False, True])
def test_num_return_sequences_repeats_rows_in_place(
    mode: str, clean: str, prediction: str, sampled: bool
) -> None:
    model = model_for(clean, prediction)
    options = {"mode": mode, "max_new_tokens": 6} | (SAMPLED if sampled else {})
    ids, real = padded(texts(4, [5, 2]), "left")
    repeated = model.generate(ids, real, num_return_sequences=3, generator=generators(6), **options)
    again = ids.repeat_interleave(3, 0), real.repeat_interleave(3, 0)
    assert torch.equal(repeated, model.generate(*again, generator=generators(6), **options))
    assert (len(repeated.unique(dim=0)) > 2) == sampled


# --- Randomness -----------------------------------------------------------------------------------


@every_mode
def test_the_seed_decides_and_global_random_state_is_left_alone(
    mode: str, clean: str, prediction: str
) -> None:
    model = model_for(clean, prediction)
    ids, real = padded(texts(5, LENGTHS), "left")

    def run(generator: Any) -> Tensor:
        return model.generate(ids, real, mode=mode, max_new_tokens=12, generator=generator, **SAMPLED)

    def state() -> list[Any]:
        return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002

    before = state()
    first = run(torch.Generator().manual_seed(0))
    assert torch.equal(first, run(torch.Generator().manual_seed(0)))
    assert not torch.equal(first, run(torch.Generator().manual_seed(1)))
    assert not torch.equal(run(None), run(None))
    assert state() == before


@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_sampled_blocks_of_one_are_sampled_ar(prediction: str) -> None:
    model = model_for("causal", prediction)
    options = {"max_new_tokens": 12} | SAMPLED
    ids, real = padded(texts(6, LENGTHS), "right")
    ar, block = (
        decode(model, ids, real, generator=generators(4), **more, **options)
        for more in ({}, {"mode": "block", "block_size": 1})
    )
    assert ar == block


# --- Ends -----------------------------------------------------------------------------------------

LONGEST = 14


@every_mode
@pytest.mark.parametrize("sampled", [False, True])
def test_nothing_comes_after_the_end_of_text(mode: str, clean: str, prediction: str, sampled: bool) -> None:
    """End-of-text tokens that do occur cut rows there, and change nothing before."""
    model = model_for(clean, prediction, seed=1)
    ids, real = padded(texts(7, LENGTHS), "left")
    options = {"mode": mode, "max_new_tokens": LONGEST, "pad_token_id": 0, "return_dict_in_generate": True}
    options |= options_for(mode) | (SAMPLED if sampled else {})
    free = continuations(model.generate(ids, real, generator=generators(4), **options), ids.shape[1])
    assert [len(row) for row in free] == [LONGEST] * 4
    # The last of these end-of-text tokens is one of a prompt, where it ends nothing.
    for ends in ([free[0][3]], [free[1][0]], [free[2][-1], free[3][5], int(ids[0, -1])]):
        output = model.generate(ids, real, generator=generators(4), eos_token_id=ends, **options)
        cut = [row[: next((i + 1 for i, token in enumerate(row) if token in ends), LONGEST)] for row in free]
        assert any(len(row) < LONGEST for row in cut)
        new = output.sequences[:, ids.shape[1] :]
        assert continuations(output, ids.shape[1]) == cut
        assert new.shape[1] == max(map(len, cut))
        assert all((new[i, len(row) :] == 0).all() for i, row in enumerate(cut))


@every_mode
def test_max_new_tokens_is_exact(mode: str, clean: str, prediction: str) -> None:
    model = model_for(clean, prediction)
    ids, real = padded(texts(8, LENGTHS), "holes")
    for count in range(1, 11):
        assert [len(row) for row in decode(model, ids, real, mode=mode, max_new_tokens=count)] == [count] * 4


@pytest.mark.parametrize(
    ("mode", "clean", "prediction"),
    [combo for combo in COMBINATIONS if combo[0] != "diffusion" and combo[1] != "full"],
)
def test_a_shorter_text_is_a_prefix_of_a_longer_one(mode: str, clean: str, prediction: str) -> None:
    model = model_for(clean, prediction)
    ids, real = padded(texts(9, LENGTHS), "left")
    longer = decode(model, ids, real, mode=mode, max_new_tokens=13, **options_for(mode))
    for count in range(1, 13):
        shorter = decode(model, ids, real, mode=mode, max_new_tokens=count, **options_for(mode))
        assert shorter == [row[:count] for row in longer]


def in_love_with_the_mask(clean: str, prediction: str) -> tuple[HybridForCausalLM, tuple[Tensor, Tensor]]:
    """A model whose favourite is the mask token, and a prompt that shows it."""
    model, prompt = model_for(clean, prediction), padded(texts(10, LENGTHS), "left")
    ids, real = prompt[0], prompt[1].bool()
    favourite = model(ids, attention_mask=real).logits[real].mean(0).argmax()
    model.lm_head.weight.data[MASK] = 9 * model.lm_head.weight.data[favourite]
    assert (model(ids, attention_mask=real).logits[real].argmax(-1) == MASK).any()
    return model, prompt


@every_mode
@pytest.mark.parametrize("sampled", [False, True])
def test_the_mask_token_is_never_an_answer(mode: str, clean: str, prediction: str, sampled: bool) -> None:
    """Not even of a model that wants to say nothing else."""
    model, (ids, real) = in_love_with_the_mask(clean, prediction)
    options = {"mode": mode, "max_new_tokens": 12} | (SAMPLED if sampled else {})
    new = decode(model, ids, real, generator=generators(4), **options)
    assert all(len(row) == 12 and MASK not in row for row in new)


@pytest.mark.parametrize("option", [{"num_beams": 3}, {"repetition_penalty": 1.2}, {"min_new_tokens": 2}])
def test_the_mask_token_is_no_answer_in_transformers_loop(option: dict[str, Any]) -> None:
    model, (ids, real) = in_love_with_the_mask("causal", "in_place")
    sequences = model.generate(ids, real, max_new_tokens=12, **option)
    assert MASK not in sequences[:, ids.shape[1] :]


@pytest.mark.parametrize("clean", ["causal", "block", "full"])
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_settings_of_greedy_decoding(clean: str, prediction: str) -> None:
    """Greedy by default, by do_sample=False, by temperature 0, and by keeping one token."""
    model = model_for(clean, prediction)
    ids, real = padded(texts(11, LENGTHS), "left")
    options = {"mode": "block", "max_new_tokens": 9}
    greedy = decode(model, ids, real, **options)
    cold, narrow = {"do_sample": True, "temperature": 0.0}, {"do_sample": True, "top_k": 1}
    for same in ({"do_sample": False}, cold, narrow):
        assert decode(model, ids, real, **options, **same) == greedy
