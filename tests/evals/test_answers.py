"""Answers to a benchmark's requests, against the likelihoods they come from, and across batch sizes."""

import math
from typing import Any

import pytest
import torch
from oracles import VOCABULARY, texts, tiny

from hybrid import HybridForCausalLM
from hybrid.evals.benchmarks.answers import Answers, usual
from hybrid.evals.likelihood import ar_nll, bound
from hybrid.training.text.tokenizing import train_bpe

TOKENIZER = train_bpe(["x" * 9], 259)  # a token for every byte
GREEDY = {"mode": "ar", "do_sample": False}


def answers(model: HybridForCausalLM | None = None, **fields: Any) -> Answers:
    settings: dict[str, Any] = {
        "model": tiny(3) if model is None else model, "tokenizer": TOKENIZER, "mode": "ar", "likelihood": "ar",
        "likelihood_block_size": None, "samples": 3, "seed": 0, "batch_size": 2, "options": {},
    }  # fmt: skip
    return Answers(**settings | fields)


def writer(**fields: Any) -> HybridForCausalLM:
    """A model of the bytes."""
    given = {"vocab_size": len(TOKENIZER), "mask_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return tiny(2, **given | fields)


def test_left_to_right_is_exact_and_knows_what_is_greedy() -> None:
    model = tiny(3)
    rows = [(row[:4], row[4:]) for row in texts(1, [9, 5, 12])]
    out = model.generate(torch.tensor([rows[0][0]]), max_new_tokens=5, eos_token_id=[])
    rows.append((rows[0][0], out[0, 4:].tolist()))  # type: ignore[index]
    found = answers(model).score(rows)
    for (given, scored), (value, greedy) in zip(rows, found, strict=True):
        ids = torch.tensor([given + scored])
        exact = ar_nll(model, ids, torch.arange(ids.shape[1])[None] >= len(given))
        assert value == pytest.approx(-float(exact))
        assert greedy == ((given, scored) == rows[-1])
        assert answers(model).score([(given, scored)]) == [(pytest.approx(value), greedy)]


@pytest.mark.parametrize(("law", "window", "clean", "prediction"), [
    ("block", None, "causal", "in_place"), ("block", 3, "causal", "in_place"), ("masked", None, "causal", "in_place"),
    ("block", None, "block", "in_place"), ("block", None, "block", "next"), ("masked", None, "block", "in_place"),
    ("masked", None, "full", "in_place"),
])  # fmt: skip
def test_a_bound_is_the_mean_of_its_draws(law: str, window: int | None, clean: str, prediction: str) -> None:
    """With seeds in blocks, where clean text says what follows it: the law that decoding in blocks has."""
    model = tiny(3, clean_attention=clean, diffusion_prediction=prediction)
    given, scored = texts(2, [3, 6])
    mode = "block" if clean != "causal" else "ar"
    few, many = (
        answers(
            model, mode=mode, likelihood=law, likelihood_block_size=window, samples=n, batch_size=100
        ).score([(given, scored)])[0]
        for n in (4, 400)
    )
    size = (window or model.config.block_size) if law == "block" else None
    ids = torch.tensor([given + scored]).expand(400, -1)
    target = (torch.arange(ids.shape[1]) >= len(given)).expand_as(ids)
    seeds = size is not None and (clean, prediction) != ("block", "in_place")
    draws = bound(model, ids, target, block_size=size, seed_tokens=seeds, samples=1, seed=9, batch_size=100)
    error = float(draws.std() / 20)
    assert -many[0] == pytest.approx(float(draws.mean()), abs=5 * error)
    if seeds:
        other = bound(model, ids, target, block_size=size, seed_tokens=False, samples=1, seed=9, batch_size=100)
        assert abs(-many[0] - float(other.mean())) > 5 * math.hypot(error, float(other.std() / 20))
    assert few != many


@pytest.mark.parametrize(("clean", "mode", "likelihood"), [
    ("causal", "ar", "ar"), ("block", "block", "block"), ("full", "block", "masked"),
])  # fmt: skip
def test_a_model_answers_as_it_was_trained_unless_told_otherwise(clean: str, mode: str, likelihood: str) -> None:
    assert usual(tiny(3, clean_attention=clean)) == (mode, likelihood)
    pure = tiny(3, clean_attention=clean, mask_token_id=None)
    if clean == "causal":
        assert usual(pure) == ("ar", "ar")
    else:
        with pytest.raises(ValueError, match=r"mask_token_id is None.*hybrid convert"):
            usual(pure)


def test_a_window_of_one_is_left_to_right() -> None:
    model = tiny(3)
    row = tuple(texts(2, [3, 6]))
    (one, _), (exact, _) = (
        answers(model, **fields).score([row])[0]  # type: ignore[list-item]
        for fields in ({"likelihood": "block", "likelihood_block_size": 1}, {})
    )
    assert one == pytest.approx(exact)


@pytest.mark.parametrize("law", ["ar", "block", "masked"])
def test_a_score_depends_on_nothing_but_its_request(law: str) -> None:
    model = tiny(3)
    rows = [(row[:4], row[4:]) for row in texts(1, [9, 5, 12])]
    want = [value for value, _ in answers(model, likelihood=law, samples=5).score(rows)]
    for size in (1, 3, 50):
        other = answers(model, likelihood=law, samples=5, batch_size=size).score(rows[::-1])[::-1]
        assert [value for value, _ in other] == pytest.approx(want, abs=1e-9)
    if law != "ar":
        assert answers(model, likelihood=law, samples=5, seed=1).score(rows)[0][0] != pytest.approx(want[0])


@pytest.mark.parametrize("law", ["block", "masked"])
def test_greedy_of_a_bound_is_what_that_mode_writes(law: str) -> None:
    model, given = tiny(3), texts(1, [4])[0]
    mode = {"block": "block", "masked": "diffusion"}[law]
    written = model.generate(torch.tensor([given]), mode=mode, max_new_tokens=6)[0, 4:].tolist()  # type: ignore[index]
    other = [*written[:-1], (written[-1] + 1) % (VOCABULARY - 1)]
    found = answers(model, likelihood=law).score([(given, written), (given, other)])
    assert [greedy for _, greedy in found] == [True, False]


# --- Writing ------------------------------------------------------------------------------------------------


def write(model: HybridForCausalLM, prompt: str, count: int, until: list[str], **options: Any) -> str:
    ids = [1, *TOKENIZER.encode(prompt)]
    (text,) = answers(model).write([ids], count, until, {**GREEDY, **options}, [0])
    return text


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    """It writes letters only."""
    model = writer(initializer_range=0.4, tie_word_embeddings=False)
    letters = set(TOKENIZER.encode("abcdefgh"))
    model.generation_config.suppress_tokens = [i for i in range(len(TOKENIZER)) if i not in letters]
    return model


@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative"])
def test_a_text_ends_before_the_first_until_string(mode: str, model: HybridForCausalLM) -> None:
    whole = write(model, "ab", 40, [], mode=mode)
    assert len(whole) == 40 and set(whole) <= set("abcdefgh")
    words = [whole[20:22], whole[9:11], "never"]
    assert write(model, "ab", 40, words, mode=mode) == whole[: min(map(whole.find, words[:2]))]
    assert write(model, "ab", 40, ["never"], mode=mode) == whole


def test_a_string_that_begins_in_the_prompt_ends_nothing(model: HybridForCausalLM) -> None:
    texts = {letter: write(model, letter, 12, []) for letter in "abcdefgh"}
    letter, whole = next((a, text) for a, text in texts.items() if a + text[0] not in text)
    assert write(model, letter, 12, [letter + whole[0]]) == whole
    assert write(model, letter, 12, [letter + whole[0], whole[4:7]]) == whole[: whole.index(whole[4:7])]


def test_an_end_of_text_ends_it(model: HybridForCausalLM) -> None:
    whole = write(model, "ab", 12, [])
    last = TOKENIZER.encode(whole[5])[0]
    assert write(model, "ab", 12, ["never"], eos_token_id=[last]) == whole[: whole.index(whole[5]) + 1]


def test_special_tokens_are_no_text(model: HybridForCausalLM) -> None:
    text = write(model, "ab", 12, [], sequence_bias={(1,): 100.0}, suppress_tokens=[0])
    assert text == ""
    assert write(model, "ab", 12, ["<|pad|>"], sequence_bias={(2,): 100.0}, suppress_tokens=[0]) == ""


@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_text_depends_on_nothing_but_its_request(mode: str, sampled: bool, model: HybridForCausalLM) -> None:
    machine = answers(model)
    rows = [[1, *TOKENIZER.encode(text)] for text in ("ab", "abcdefg", "h", "gg ff")]
    options = {"mode": mode, "do_sample": sampled} | ({"temperature": 1.5} if sampled else {})
    seeds = [machine.seed_of(row) for row in rows]
    together = machine.write(rows, 15, ["ab", "c"], options, seeds)
    assert together == [
        machine.write([row], 15, ["ab", "c"], options, [seed])[0] for row, seed in zip(rows, seeds, strict=True)
    ]


# --- Complaints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "config", "said"), [
    ({"likelihood": "exact"}, {}, "likelihood is 'exact'; use one of 'ar', 'block', 'masked'"),
    ({"mode": "block"}, {"clean_attention": "full"}, "likelihood='ar': .*use 'masked'"),
    ({"mode": "block", "likelihood": "block"}, {"clean_attention": "full"}, "likelihood='block': .*use 'masked'"),
    ({"likelihood": "masked"}, {"mask_token_id": None}, "likelihood='masked': a pure AR model"),
    ({"likelihood_block_size": 2}, {}, "likelihood_block_size .*leave it out"),
    ({"likelihood": "block", "likelihood_block_size": 0}, {}, "likelihood_block_size is 0"),
    ({"samples": 0}, {}, "samples is 0"),
    ({"batch_size": 0}, {}, "batch_size is 0"),
    ({"mode": "fast"}, {}, "mode is 'fast'"),
    ({"options": {"max_new_tokens": 3}}, {}, "max_new_tokens: .*max_gen_toks"),
    ({"options": {"num_beams": 3}}, {}, "num_beams: only transformers"),
    ({"options": {"temperatur": 3}}, {}, "temperatur'.*Did you mean temperature"),
    ({"options": {"temperature": 0.5}}, {}, "temperature only matters when sampling"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_runs(fields: Any, config: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        answers(tiny(3, **config), **fields)
