"""What a checkpoint or a caller says by the way: stored options never count as asked for, and what cannot be taken is
named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import MASK, padded, texts, tiny
from transformers import BatchEncoding, GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, pipeline

from hybrid import HybridForCausalLM
from hybrid.checkpoints.tensorfile import CheckpointError
from hybrid.formats import formats
from hybrid.sampling import Request, decode_all
from hybrid.sampling.options.merge import _names
from hybrid.training.text.tokenizing import character_tokenizer

MODES = ("ar", "block", "diffusion", "speculative")
every_mode = pytest.mark.parametrize("mode", MODES)
IDS = torch.tensor(texts(1, [5, 5]))


def stored(tmp_path: Path, **fields: Any) -> HybridForCausalLM:
    """A model whose generation_config.json says something more."""
    model = tiny(3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return HybridForCausalLM.from_pretrained(tmp_path)


# --- What is stored -------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@every_mode
@pytest.mark.parametrize(
    "fields",
    [
        {"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "hybrid"},
        {"cache_config": {"batch_size": 3}}, {"max_cache_len": 7}, {"a_field_of_tomorrow": 3},
        {"prompt_lookup_num_tokens": 3}, {"num_assistant_tokens": 4}, {"output_logits": True},
        {"output_attentions": True}, {"output_hidden_states": True}, {"low_memory": True}, {"prefill_chunk_size": 2},
        {"length_penalty": 0.5}, {"disable_compile": True}, {"output_scores": True},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_what_is_stored_changes_neither_loop_nor_text(mode: str, fields: dict[str, Any], tmp_path: Path) -> None:
    want: Any = tiny(3).generate(IDS, mode=mode, max_new_tokens=6, return_dict_in_generate=True)
    model = stored(tmp_path, **fields)
    for given in ({}, {"generation_config": model.generation_config}):
        out: Any = model.generate(IDS, mode=mode, max_new_tokens=6, return_dict_in_generate=True, **given)
        assert torch.equal(out.sequences, want.sequences)
        assert out.stats.mode == mode and out.stats.forwards == want.stats.forwards  # our loop, and no other
        assert out.past_key_values is not None
        assert isinstance(model.generate(IDS, mode=mode, max_new_tokens=6, **given), torch.Tensor)
    assert model.infill(torch.tensor([[1, MASK, 2]]), mode=None).shape == (1, 3)
    done, _ = decode_all(model, [Request(IDS[0])], mode=mode, max_new_tokens=6)
    assert done[0].tokens == want.sequences[0, 5:].tolist()


@every_mode
def test_stored_beams_are_for_the_mode_that_has_them(mode: str, tmp_path: Path) -> None:
    model, plain = stored(tmp_path, num_beams=3), tiny(3)
    options = {"mode": mode, "max_new_tokens": 6}
    beams = {"num_beams": 3} if mode == "ar" else {}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options, **beams))
    assert model.infill(torch.tensor([[1, MASK, 2]])).shape == (1, 3)
    if mode != "ar":  # what was asked for does not vanish
        for given in ({"num_beams": 2}, {"generation_config": GenerationConfig(num_beams=2)}):
            with pytest.raises(ValueError, match="num_beams: only mode='ar'"):
                model.generate(IDS, **options, **given)


@pytest.mark.parametrize(("name", "value"), [("cache_implementation", "static"), ("max_cache_len", 3)])
def test_another_cache_is_refused_where_it_is_asked_for(name: str, value: Any) -> None:
    for given in ({name: value}, {"generation_config": GenerationConfig(**{name: value})}):
        with pytest.raises(ValueError, match=f"{name}: this model keeps a cache of its own"):
            tiny().generate(IDS, max_new_tokens=2, **given)


def test_beams_beside_a_stored_cache(tmp_path: Path) -> None:
    model = stored(tmp_path, cache_implementation="static", use_cache=False)
    options: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 5}
    assert torch.equal(model.generate(IDS, **options), tiny(3).generate(IDS, **options))
    assert model.generation_config.cache_implementation == "static"


def test_a_foreign_use_cache_is_not_ours(tmp_path: Path) -> None:
    """LLaDA's released config.json says false, and so do many that were saved while training."""
    fields = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=2, use_cache=False)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    model = HybridForCausalLM.from_pretrained(tmp_path, mask_token_id=39)
    out: Any = model.generate(IDS, mode="block", max_new_tokens=3, return_dict_in_generate=True)
    assert out.past_key_values is not None and model.config.use_cache
    out = model.generate(IDS, mode="block", max_new_tokens=3, return_dict_in_generate=True, use_cache=False)
    assert out.past_key_values is None
    full = tiny(clean_attention="full")
    full.generation_config.use_cache = full.config.use_cache = False
    assert full.generate(IDS, mode="block", max_new_tokens=4, cache="prefix").shape == (2, 9)
    with pytest.raises(ValueError, match="use_cache"):
        full.generate(IDS, mode="block", max_new_tokens=4, cache="prefix", use_cache=False)


def test_pipelines_hand_in_what_is_stored(tmp_path: Path) -> None:
    model = stored(tmp_path, cache_implementation="static", num_beams=2, a_field_of_tomorrow=3)
    model.float()
    generator = pipeline("text-generation", model=model, tokenizer=character_tokenizer("abcdefghijkl"))
    for mode in MODES:
        text = generator("adg", max_new_tokens=6, mode=mode, do_sample=False)[0]["generated_text"]
        assert text.startswith("adg")


# --- Fields given to from_pretrained --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Fast_dLLM_Qwen", "Dream"])
def test_a_given_mask_is_the_one_that_is_checked(kind: str, tmp_path: Path) -> None:
    """These folders do not name their mask, and the format's default lies beyond a small vocabulary."""
    config = Qwen2Config(
        vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    raw = config.to_dict() | {"model_type": kind}
    config = formats()[kind].config(raw, {"mask_token_id": 66, "block_size": 4})
    assert (config.mask_token_id, config.block_size) == (66, 4)
    HybridForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = HybridForCausalLM.from_pretrained(tmp_path, mask_token_id=66)
    assert model.config.mask_token_id == 66
    with pytest.raises(CheckpointError, match="mask_token_id"):
        HybridForCausalLM.from_pretrained(tmp_path)


ROPE = {
    "unknown": ({"rope_type": "spiral"}, "rope_type 'spiral'"),
    "of length": ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
    "no factor": ({"rope_type": "linear"}, "factor"),
    "no factor of yarn": ({"rope_type": "yarn"}, "factor"),
    "fields missing": ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor|high_freq_factor"),
    "a word": ({"rope_type": "linear", "factor": "big"}, "factor|rope_parameters"),
    "in part": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "by layers": ({"full_attention": {"rope_type": "default"}}, "rope"),
    "a theta": ({"rope_type": "default", "rope_theta": "x"}, "rope_theta"),
}


@pytest.mark.parametrize("case", ROPE)
@pytest.mark.parametrize("foreign", [False, True])
def test_positions_that_cannot_be_computed(case: str, foreign: bool, tmp_path: Path) -> None:
    tiny(dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw, (rope, word) = json.loads(path.read_text()), ROPE[case]
    if foreign:
        raw["model_type"] = "llama"
    path.write_text(json.dumps(raw | {"rope_parameters": {"rope_theta": 1e4} | rope}))
    with pytest.raises(CheckpointError, match=word):
        HybridForCausalLM.from_pretrained(tmp_path)


def test_a_vocabulary_is_not_cut_below_the_mask(tmp_path: Path) -> None:
    model = tiny(mask_token_id=20)
    for size in (20, 5):
        with pytest.raises(ValueError, match=r"new_num_tokens is .*mask_token_id is 20"):
            model.resize_token_embeddings(size)
    assert model.get_input_embeddings().weight.shape[0] == 24
    for size, options in ((21, {}), (19, {"pad_to_multiple_of": 8}), (40, {})):
        model.resize_token_embeddings(size, **options)
        model.save_pretrained(tmp_path)
        again = HybridForCausalLM.from_pretrained(tmp_path)
        assert again.config.vocab_size == len(again.lm_head.weight) == {19: 24}.get(size, size)
        ids = model.generate(IDS % 10, mode="block", max_new_tokens=6)
        assert torch.equal(again.generate(IDS % 10, mode="block", max_new_tokens=6), ids)


# --- Texts in other shapes ------------------------------------------------------------------------


@every_mode
def test_however_the_text_comes(mode: str) -> None:
    model, options = tiny(2), {"mode": mode, "max_new_tokens": 5}
    ids, real = padded(texts(3, [5, 2]), "left")
    even, want = model.generate(IDS, **options), model.generate(ids, real, **options)
    assert torch.equal(model.generate(inputs=IDS, **options), even)
    for given in (IDS.tolist(), IDS.numpy(), np.asarray(IDS, dtype=np.int32), IDS.int()):
        assert torch.equal(model.generate(given, **options), even)
        assert torch.equal(model.generate(input_ids=given, **options), even)
    encoded = BatchEncoding({"input_ids": ids, "attention_mask": real, "token_type_ids": torch.zeros_like(ids)})
    assert torch.equal(model.generate(encoded, **options), want)
    assert torch.equal(model.generate(**encoded, **options), want)
    assert torch.equal(model.generate(ids.tolist(), real.tolist(), **options), want)


WRONG = {
    "uneven": ([[1, 2], [3]], "input_ids is a list .* padded"),
    "words": (["a text"], "input_ids is a list"),
    "a word": ("a text", "input_ids is a str"),
    "one row": ([1, 2, 3], r"input_ids has shape \(3,\)"),
    "floats": ([[1.0, 2.0]], "input_ids has shape .* whole"),
    "flags": ([[True, False]], "input_ids has shape .* whole"),
    "more": (BatchEncoding({"input_ids": IDS, "pixel_values": IDS}), "pixel_values"),
}


@pytest.mark.parametrize("case", WRONG)
def test_texts_that_are_none(case: str) -> None:
    given, words = WRONG[case]
    for act in (tiny().generate, tiny().infill):
        with pytest.raises(ValueError, match=words):
            act(given)
    with pytest.raises(ValueError, match="inputs and input_ids"):
        tiny().generate(IDS, inputs=IDS)
    with pytest.raises(ValueError, match="token_type_ids"):
        tiny().generate(IDS, token_type_ids=torch.ones_like(IDS))
    with pytest.raises(ValueError, match="attention_mask"):
        tiny().generate(IDS, torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 5, 5\)"):
        tiny()(IDS, attention_mask=torch.ones(2, 1, 5, 5))


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds", "position_ids", "attention_mask", "layout"])
def test_a_forward_takes_tensors_of_the_right_kind(name: str) -> None:
    model, whole = tiny(), name in ("input_ids", "position_ids")
    wrong = [True, "x", [[1, 2]], np.zeros((2, 5)), -1, 1.5, (1,), {}, object()]
    wrong += [torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.bool)] if whole else []
    for value in wrong:
        given = {} if name in ("input_ids", "inputs_embeds") else {"input_ids": IDS}
        for act in (model, model.model):
            with pytest.raises(ValueError, match=f"{name} (is a|has dtype)"):
                act(**{**given, name: value})


PAD = 7


@every_mode
@pytest.mark.parametrize("where", ["given", "stored", "config"])
def test_padding_is_found_as_they_find_it(mode: str, where: str) -> None:
    """Every pad token, where a text cannot end with one."""
    model = tiny(2, **({"pad_token_id": PAD} if where == "config" else {}))
    if where == "stored":
        model.generation_config.pad_token_id = PAD
    given: dict[str, Any] = {"pad_token_id": PAD} if where == "given" else {}
    rows = [[x if x != PAD else 1 for x in row] for row in texts(4, [6, 2, 4])]
    for pattern in ("left", "right"):
        ids, real = padded(rows, pattern)
        ids = ids.where(real == 1, PAD)
        options = {"mode": mode, "max_new_tokens": 5, **given}
        assert torch.equal(model.generate(ids, **options), model.generate(ids, real, **options))
        whole = torch.ones_like(ids)
        for ends in (PAD, [3, PAD]):
            got = model.generate(ids, eos_token_id=ends, **options)
            assert torch.equal(got, model.generate(ids, whole, eos_token_id=ends, **options))
        assert not torch.equal(model.generate(ids, whole, **options), model.generate(ids, real, **options))


def test_padding_of_gaps() -> None:
    model = tiny(2, pad_token_id=PAD)
    ids = torch.tensor([[PAD, PAD, 1, MASK, 2], [3, MASK, MASK, 4, 5]])
    real = ids != PAD
    assert torch.equal(model.infill(ids), model.infill(ids, real.long()))
    both = tiny(2, pad_token_id=MASK)  # which some checkpoints have: gaps are no padding
    assert torch.equal(both.infill(ids), both.infill(ids, torch.ones_like(ids)))


def test_padding_is_found_as_llama_finds_it(tmp_path: Path) -> None:
    fields = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    theirs = LlamaForCausalLM(
        LlamaConfig(**fields, num_attention_heads=2, initializer_range=0.5, eos_token_id=3, pad_token_id=PAD)
    )
    theirs.save_pretrained(tmp_path)
    ours = HybridForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[PAD, PAD, 1, 2, 4], [1, 6, 2, 9, 3]])
    got, want = (model.generate(ids, max_new_tokens=9) for model in (ours, theirs))
    assert torch.equal(got, want)


# --- Values that are none -------------------------------------------------------------------------

VALUES: list[Any] = [
    True, "x", ["a"], [1], {}, object(), -1, 1.5, 0, print, float("nan"), float("inf"), torch.tensor([1.5]), b"x",
    np.float32(1), (1, 2),
]  # fmt: skip


@every_mode
@pytest.mark.parametrize(
    "name", sorted({*_names()[0], "generator", "past_key_values", "attention_mask", "inputs", "token_type_ids"})
)
def test_any_value_is_taken_or_named(name: str, mode: str) -> None:
    model = tiny()
    ids = {} if name == "inputs" else {"input_ids": IDS}
    for value in VALUES:
        for more in ({}, {"do_sample": True}):
            options: dict[str, Any] = {"mode": mode, "max_new_tokens": 2, **more, **ids, name: value}
            try:
                model.generate(**options)
            except ValueError as error:
                words = {"inputs": "input_ids"}.get(name, name)
                assert words in str(error), f"{name}={value!r}: {error}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generator", 0), ("watchers", print), ("num_return_sequences", True), ("top_k", True), ("top_p", True),
        ("max_new_tokens", True),
        ("block_size", True), ("temperature", True), ("reveal", ["threshold"]), ("do_sample", "yes"),
        ("steps_per_block", True), ("confidence_threshold", True), ("min_new_tokens", True), ("max_time", True),
        ("drafts_per_round", True), ("sub_block_size", True), ("pad_token_id", True), ("eos_token_id", True),
        ("max_length", True), ("no_repeat_ngram_size", True), ("repetition_penalty", True), ("use_cache", 1),
        ("return_dict_in_generate", "no"), ("dream_eps", True), ("remask_strength", True), ("entropy_bound", True),
        ("confidence_factor", True), ("reveal", {}), ("mode", ["ar"]), ("cache", ["dual"]), ("draft_adapter", 3),
    ],
)  # fmt: skip
def test_values_that_look_like_others_are_refused(name: str, value: Any) -> None:
    mode = "speculative" if name in ("drafts_per_round",) else "block"
    more = {"do_sample": True} if name in ("top_k", "top_p", "temperature") else {}
    with pytest.raises(ValueError, match=name):
        tiny().generate(IDS, **{"mode": mode, "max_new_tokens": 2, **more, name: value})
