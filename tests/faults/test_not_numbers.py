"""Logits that are no numbers, and formats with few digits: an error that says which row and step, and the same
positions, norms and laws whichever way a model came to its format."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import COMBINATIONS, MASK, VOCABULARY, generators, texts, tiny
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.sampling import LogitsError, Request, Session

BAD = 17  # the token whose embedding is no number
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 5}
WAYS: list[tuple[str, str, str, dict[str, Any]]] = [
    *((mode, clean, prediction, {}) for mode, clean, prediction in COMBINATIONS),
    ("speculative", "causal", "in_place", {"fused": True}),
    ("speculative", "causal", "in_place", {"drafts_per_round": 2}),
    ("block", "full", "in_place", {"cache": "dual"}), ("block", "full", "next", {"cache": "prefix"}),
    ("block", "causal", "in_place", {"reveal": "remdm"}), ("block", "causal", "in_place", {"reveal": "entropy_bound"}),
    ("diffusion", "causal", "next", {"reveal": "ancestral"}), ("block", "causal", "next", {"confidence_factor": 1.0}),
]  # fmt: skip
ways = pytest.mark.parametrize(("mode", "clean", "prediction", "more"), WAYS)


def broken(clean: str, prediction: str) -> HybridForCausalLM:
    """Rows with a certain token have no logits."""
    model = tiny(3, clean_attention=clean, diffusion_prediction=prediction)
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = torch.nan
    return model


def rows() -> Tensor:
    ids = torch.tensor([[t if t != BAD else 1 for t in row] for row in texts(3, [6, 6, 6])])
    ids[1, 4] = BAD
    return ids


@ways
@pytest.mark.parametrize("sampled", [False, True])
def test_the_row_and_the_step_are_named(
    mode: str, clean: str, prediction: str, more: dict[str, Any], sampled: bool
) -> None:
    model, ids = broken(clean, prediction), rows()
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 6, **more, **(SAMPLED if sampled else {})}
    options["suppress_tokens"] = [BAD]
    with pytest.raises(LogitsError, match=r"row 1, step \d+: .*not numbers") as caught:
        model.generate(ids, generator=generators(3), **options)
    assert caught.value.row == 1 and caught.value.step >= 1
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.row, again.step, str(again)) == (1, caught.value.step, str(caught.value))
    # The model is as it was, and the others' texts are what they are alone.
    whole = model.generate(ids[::2], generator=generators(3)[::2], **options)
    session = Session(model, slots=3, **options)
    numbers = [session.admit(Request(row, generator=g)) for row, g in zip(ids, generators(3), strict=True)]
    done: dict[int, Any] = {}
    while len(done) < 3:
        done |= {d.index: d for d in session.step()}
    assert isinstance(done[numbers[1]].error, LogitsError) and f"row {numbers[1]}," in str(done[numbers[1]].error)
    assert [done[numbers[i]].tokens for i in (0, 2)] == whole[:, 6:].tolist()


@ways
def test_from_the_middle_of_a_text(mode: str, clean: str, prediction: str, more: dict[str, Any]) -> None:
    """The cache is what the caller's text is: the same call works once the numbers are numbers again."""
    model = tiny(3, clean_attention=clean, diffusion_prediction=prediction)
    ids = torch.tensor(texts(3, [6, 6]))
    begun = mode if clean == "block" and mode in ("ar", "speculative") else "block"  # text sees itself alike in both
    first: Any = model.generate(ids, mode=begun, max_new_tokens=4, return_dict_in_generate=True)
    options = {"mode": mode, "max_new_tokens": 8, **more}
    want = model.generate(first.sequences, generator=generators(2), **options)
    head, calls = model.lm_head.forward, 0

    def failing(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = head(hidden)
        return torch.full_like(out, torch.nan) if calls == 2 else out

    model.lm_head.forward = failing  # type: ignore[method-assign]
    with pytest.raises(LogitsError, match="row 0, step"):
        model.generate(first.sequences, past_key_values=first.past_key_values, **options)
    del model.lm_head.forward
    options |= {"generator": generators(2), "past_key_values": first.past_key_values}
    assert torch.equal(model.generate(first.sequences, **options), want)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative", "infill"])
@pytest.mark.parametrize("sampled", [False, True])
def test_any_value_that_is_none(value: float, mode: str, sampled: bool) -> None:
    """Of a processor's making: NaN and infinity are no numbers, and where all is forbidden there is no token."""
    model = tiny()

    def processor(_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([2]), value) if value != -torch.inf else torch.full_like(scores, value)

    options: dict[str, Any] = {"logits_processor": [processor], **(SAMPLED if sampled else {})}
    words = "every token is forbidden" if value == -torch.inf else "not numbers"
    with pytest.raises(LogitsError, match=f"row 0, step [12]: .*{words}"):
        if mode == "infill":
            model.infill(torch.tensor([[1, MASK, MASK, 2]]), **options)
        elif mode == "diffusion":
            model.generate(torch.tensor([[1, 2, 3]]), mode=mode, max_new_tokens=4, **options)
        else:
            model.generate(torch.tensor([[1, 2, 3]]), mode=mode, max_new_tokens=4, **options)


@ways
@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-320])
def test_temperatures_that_leave_no_numbers(
    mode: str, clean: str, prediction: str, more: dict[str, Any], temperature: float
) -> None:
    model = tiny(4, dtype=torch.float32, clean_attention=clean, diffusion_prediction=prediction)
    ids = torch.tensor(texts(4, [5]))
    for extra in ({}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1}):
        with pytest.raises(LogitsError, match=rf"row 0, step \d+: .*temperature of {temperature}"):
            model.generate(
                ids, mode=mode, max_new_tokens=9, do_sample=True, temperature=temperature, generator=generators(1),
                **extra, **more,
            )  # fmt: skip


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_temperatures_are_greedy(
    mode: str, clean: str, prediction: str, more: dict[str, Any], dtype: torch.dtype
) -> None:
    """float16 itself has no numbers beyond 65,504: logits are divided in float32."""
    model = tiny(4, dtype=torch.float32, clean_attention=clean, diffusion_prediction=prediction).to(dtype)
    options = {"mode": mode, "max_new_tokens": 9, "generator": generators(1), **more}
    ids = torch.tensor(texts(4, [5]))
    out = model.generate(ids, do_sample=True, temperature=1e-6, **options)
    if dtype == torch.float32 and more.get("reveal") not in ("remdm", "ancestral"):  # which draw the slots, too
        assert torch.equal(out, model.generate(ids, **options))
    assert out.shape == (1, 14) and (out >= 0).all() and (out < VOCABULARY).all()


# --- Formats with few digits ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["to", "named", "module", "twice", "default"])
@torch.no_grad()
def test_however_a_model_comes_to_its_format(dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    """Positions above all: in bfloat16, frequencies put a token thousands of places off."""
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
    model = tiny(5, dtype=torch.float32, qk_norm=True, max_position_embeddings=512, rope_parameters=scaled)
    model.save_pretrained(tmp_path)
    want = HybridForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    if way == "to":
        cast = HybridForCausalLM.from_pretrained(tmp_path).to(dtype)
    elif way == "named":
        cast = HybridForCausalLM.from_pretrained(tmp_path)
        cast = cast.bfloat16() if dtype == torch.bfloat16 else cast.half()
    elif way == "module":  # as trainers do, with all that is in it
        cast = torch.nn.ModuleList([HybridForCausalLM.from_pretrained(tmp_path)]).to(dtype)[0]
    elif way == "twice":
        cast = HybridForCausalLM.from_pretrained(tmp_path).double().to(dtype)
    else:
        torch.set_default_dtype(dtype)
        try:
            cast = HybridForCausalLM(want.config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        cast.load_state_dict(want.state_dict())
    ids = torch.tensor(texts(5, [300, 300]))
    assert torch.equal(cast(ids).logits, want(ids).logits)
    for mode in ("ar", "block", "diffusion", "speculative"):
        options: dict[str, Any] = {"mode": mode, "max_new_tokens": 6, "output_scores": True}
        options["return_dict_in_generate"] = True
        one, other = cast.generate(ids, **options), want.generate(ids, **options)
        assert torch.equal(one.sequences, other.sequences) and torch.equal(one.log_probs, other.log_probs)
    assert torch.equal(cast.float().model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_a_model_made_without_memory_has_its_positions(tmp_path: Path) -> None:
    tiny(5, dtype=torch.float32).save_pretrained(tmp_path)
    want = HybridForCausalLM.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = HybridForCausalLM(want.config)
    model = model.to_empty(device="cpu")
    model.load_state_dict(want.state_dict())
    model.model.rotary_emb = type(want.model.rotary_emb)(want.config)
    ids = torch.tensor(texts(5, [30]))
    assert torch.equal(model.eval()(ids).logits, want(ids).logits)


@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative"])
@torch.no_grad()
def test_autocast(mode: str) -> None:
    """Beside a model of that format: the same up to its last digits, and the text comes to its end."""
    model = tiny(5, dtype=torch.float32, hidden_size=32)
    ids = torch.tensor(texts(5, [9, 9]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
        out: Any = model.generate(ids, mode=mode, max_new_tokens=6, output_scores=True, return_dict_in_generate=True)
    torch.testing.assert_close(logits.float(), model(ids).logits, atol=0.3, rtol=0.1)
    assert out.sequences.shape == (2, 15) and out.log_probs.isfinite().all()


def test_laws_have_the_digits_of_float32() -> None:
    """In bfloat16 itself, sums over a vocabulary lose what a nucleus is made of."""
    model = tiny(6, dtype=torch.bfloat16)
    out: Any = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=True, temperature=0.7, top_p=0.9, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    logits = model(out.sequences[:, :-1]).logits[0, 2:].float()
    logits[:, MASK] = -torch.inf
    for scores, row in zip(out.scores, logits, strict=True):
        kept = scores[0].isfinite()
        torch.testing.assert_close(scores[0][kept], (row / 0.7)[kept], atol=0.2, rtol=0.02)
        assert not torch.equal(scores[0][kept], scores[0][kept].bfloat16().float())
