"""Llama, Mistral, Qwen2 and Qwen3 as transformers runs them: the same logits, the same tokens, the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    MASK,
    continuations,
    generators,
    labels_of,
    padded,
    places,
    roughen,
    table,
    texts,
    tiny,
    two_streams,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hybrid import HybridConfig, HybridForCausalLM, Layout
from hybrid.checkpoints.weights import Weights
from hybrid.formats import formats

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 5e5,
}  # fmt: skip

FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama wide heads": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=10, rms_norm_eps=1e-3)),
    "llama linear": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LINEAR)),
    "llama yarn": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=YARN)),
    "llama llama3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen2 tied": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)),
    "gemma": (GemmaForCausalLM, GemmaConfig(**SIZES, head_dim=8)),
    "gemma untied": (GemmaForCausalLM, GemmaConfig(**SIZES, head_dim=8, tie_word_embeddings=False)),
    "olmo": (OlmoForCausalLM, OlmoConfig(**SIZES)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SIZES)),
    "phi3 tied": (Phi3ForCausalLM, Phi3Config(**SIZES, tie_word_embeddings=True)),
    "qwen3 tied": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
}

every_family = pytest.mark.parametrize("name", FAMILIES)
ROWS = texts(0, [9, 3, 12, 1], vocabulary=40)


def theirs(name: str) -> PreTrainedModel:
    """A random model of another library."""
    family, config = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = family(config).eval()
        roughen(model)
    return model


def loaded(model: PreTrainedModel, folder: Path, **options: Any) -> HybridForCausalLM:
    model.save_pretrained(folder)
    ours = HybridForCausalLM.from_pretrained(folder, **options)
    assert isinstance(ours, HybridForCausalLM)
    return ours


def settings(model: PreTrainedModel) -> dict[str, Any]:
    """All of its configuration but where it was loaded from."""
    return {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}


@torch.no_grad()
def assert_equal(ours: PreTrainedModel, other: PreTrainedModel) -> None:
    """Logits of an unpadded and a left-padded batch, and greedy tokens."""
    even = torch.tensor(texts(1, [20, 20], vocabulary=40))
    mine, want = (model(even, labels=even) for model in (ours, other))
    torch.testing.assert_close(mine.logits, want.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.loss, want.loss)
    ids, real = padded(ROWS, "left")
    positions = (real.cumsum(1) - 1).clamp(min=0)  # their plain forward counts the padding
    theirs = other(ids, attention_mask=real, position_ids=positions).logits
    for more in ({}, {"position_ids": positions}):
        logits = ours(ids, attention_mask=real, **more).logits
        torch.testing.assert_close(logits[real == 1], theirs[real == 1], atol=1e-5, rtol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    got, want = (model.generate(ids, attention_mask=real, **options) for model in (ours, other))
    assert torch.equal(got[:, ids.shape[1] :], want[:, ids.shape[1] :])


@every_family
def test_their_folder_loads_and_says_the_same(name: str, tmp_path: Path) -> None:
    other = theirs(name)
    ours = loaded(other, tmp_path)
    assert_equal(ours, other)
    assert ours.config.model_type == "hybrid" and not ours.config.is_hybrid
    assert ours.num_parameters() == other.num_parameters()


@every_family
def test_our_weights_load_into_their_class(name: str) -> None:
    family, config = FAMILIES[name]
    fields = {k: v for k, v in config.to_dict().items() if k in HybridConfig.__annotations__}
    fields |= {"attention_bias": "qwen2" in name, "qk_norm": "qwen3" in name}
    if "gemma" in name:
        fields |= {"norm": "rms_offset", "scale_embeddings": True}
    if "olmo" in name:
        fields |= {"norm": "layer_bare", "rms_norm_eps": 1e-5}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        ours = HybridForCausalLM(HybridConfig(**fields)).eval()
        roughen(ours)
    other = family(config).eval()
    weights = formats()[config.model_type].to_theirs(Weights.of(ours.state_dict()), ours.config)
    other.load_state_dict({name: weights.read(name) for name in weights.tensors}, strict=True)
    assert_equal(ours, other)


@every_family
def test_and_is_written_again_as_theirs(name: str, tmp_path: Path) -> None:
    other = theirs(name)
    ours = loaded(other, tmp_path / "theirs")
    formats()[other.config.model_type].write(ours, tmp_path / "written")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "written").eval()
    assert type(again) is type(other)
    state = again.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in other.state_dict().items())
    assert_equal(ours, again)


@every_family
def test_a_loaded_model_is_saved_as_ours(name: str, tmp_path: Path) -> None:
    ours = loaded(theirs(name), tmp_path / "theirs", mask_token_id=39)
    ours.save_pretrained(tmp_path / "ours")
    again = HybridForCausalLM.from_pretrained(tmp_path / "ours")
    assert settings(again) == settings(ours)
    assert again.config.is_hybrid
    ids, options = torch.tensor(texts(1, [20, 20], vocabulary=39)), {"mode": "block", "max_new_tokens": 10}
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert torch.equal(again.generate(ids, **options), ours.generate(ids, **options))


@pytest.mark.parametrize(
    "layout",
    [
        Layout.blocks(places(16), 4),
        Layout.bidirectional(places(16)),
        two_streams(8, 4),
        two_streams(8, 4, "block"),
        Layout.causal(places(10)).cat(Layout.window(places(6, 10))),
    ],
    ids=["blocks", "full", "two streams", "two streams, clean blocks", "window"],
)
@torch.no_grad()
def test_a_layout_is_their_model_under_that_mask(layout: Layout) -> None:
    """Their attention takes a mask of its own and positions of its own."""
    other = theirs("llama")
    ours = tiny(dtype=torch.float32, **{**SIZES, "mask_token_id": 39})
    ours.load_state_dict(other.state_dict())
    ids, labels = torch.tensor(texts(3, [16], vocabulary=40)), labels_of(layout)
    mask = torch.tensor(table(labels, labels))[None, None]
    want = other(ids, attention_mask=mask, position_ids=layout.position).logits
    torch.testing.assert_close(ours(ids, layout=layout).logits, want, atol=1e-5, rtol=1e-5)


# --- transformers' own loop over our model and cache ----------------------------------------------


@pytest.mark.parametrize("ends", [None, [5, 17]])
@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search_is_theirs(beams: int, ends: list[int] | None, tmp_path: Path) -> None:
    other = theirs("llama")
    ours = loaded(other, tmp_path)
    ids, real = padded(ROWS, "left")
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 15, "eos_token_id": ends}
    got, want = (model.generate(ids, attention_mask=real, **options) for model in (ours, other))
    assert torch.equal(got[:, ids.shape[1] :], want[:, ids.shape[1] :])
    greedy = other.generate(ids, attention_mask=real, max_new_tokens=15, eos_token_id=ends)
    assert got.shape != greedy.shape or not torch.equal(got, greedy)


@pytest.mark.parametrize("pattern", ["right", "holes"])
def test_beam_search_takes_any_padding(pattern: str, tmp_path: Path) -> None:
    """Theirs takes padding on the left only; ours is what it is there."""
    ours = loaded(theirs("llama"), tmp_path)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8}
    (left, real), (other, also_real) = padded(ROWS, "left"), padded(ROWS, pattern)
    want = ours.generate(left, attention_mask=real, **options)[:, left.shape[1] :]
    sequences = ours.generate(other, attention_mask=also_real, **options)
    assert torch.equal(sequences[:, : other.shape[1]], other)
    assert torch.equal(sequences[:, other.shape[1] :], want)


def test_their_penalties_run_in_their_loop(tmp_path: Path) -> None:
    other = theirs("qwen3")
    ours = loaded(other, tmp_path)
    ids, real = padded(ROWS, "left")
    options: dict[str, Any] = {"max_new_tokens": 15, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    got, want = (model.generate(ids, attention_mask=real, **options) for model in (ours, other))
    assert torch.equal(got[:, ids.shape[1] :], want[:, ids.shape[1] :])


# --- Our own files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"clean_attention": "block", "diffusion_prediction": "next", "tie_word_embeddings": True},
        {"clean_attention": "full", "qk_norm": True, "attention_bias": True, "eos_token_id": [1, 2]},
        {"rope_parameters": YARN, "mask_token_id": None, "pad_token_id": 4},
    ],
)
def test_saving_and_loading_changes_no_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(3, **fields)
    model.save_pretrained(tmp_path)
    ids = torch.tensor(texts(4, [12]))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, HybridConfig)
    for again in (
        HybridForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config),
    ):
        assert isinstance(again, HybridForCausalLM)
        assert not again.training and again.dtype == model.dtype
        assert settings(again) == settings(model)
        state = again.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_arguments_of_from_pretrained_override_the_file(tmp_path: Path) -> None:
    tiny(3, mask_token_id=None).save_pretrained(tmp_path)
    model = HybridForCausalLM.from_pretrained(tmp_path, mask_token_id=7, block_size=2, dtype=torch.bfloat16)
    assert (model.config.mask_token_id, model.config.block_size, model.dtype) == (7, 2, torch.bfloat16)


@pytest.mark.parametrize("way", ["by attribute", "as a whole"])
def test_defaults_of_decoding_travel_with_the_model(way: str, tmp_path: Path) -> None:
    """generation_config.json holds them; arguments win over generation_config=, which wins over the file."""
    model = tiny(5, peaked=0.4)
    ids, real = padded(texts(5, [6, 2]), "left")
    stored = {"mode": "block", "block_size": 3, "confidence_threshold": 0.3, "max_new_tokens": 9}
    given: Any = model.generate(ids, real, return_dict_in_generate=True, **stored)
    if way == "as a whole":
        model.generation_config = GenerationConfig(**stored)
    for name, value in stored.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    model = HybridForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(model.generation_config, name) for name in stored} == stored

    def run(**options: Any) -> Any:
        return model.generate(ids, real, return_dict_in_generate=True, **options)

    default = run()
    assert torch.equal(default.sequences, given.sequences)
    assert default.stats.mode == "block" and default.stats.draft == given.stats.draft
    assert run(block_size=5).stats.rows != default.stats.rows
    assert run(confidence_threshold=1.0).stats.draft > default.stats.draft
    assert run(generation_config=GenerationConfig(max_new_tokens=4)).stats.tokens == 8
    assert run(generation_config=GenerationConfig(max_new_tokens=4), max_new_tokens=5).stats.tokens == 10
    for mode in ("ar", "speculative", "diffusion"):  # which have no use for some of the defaults
        assert run(mode=mode).stats.mode == mode
    assert run(mode="block", reveal="steps").stats.mode == "block"
    beams = model.generate(ids, real, mode="ar", num_beams=2)
    assert beams.shape == (2, ids.shape[1] + 9)


def test_sampling_defaults_travel_too(tmp_path: Path) -> None:
    model = tiny(6)
    ids = torch.tensor(texts(6, [6] * 3))
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 5, "max_new_tokens": 20}
    sampled["eos_token_id"] = [1, 2, 3]
    want = continuations(
        model.generate(ids, generator=generators(3), return_dict_in_generate=True, **sampled), ids.shape[1]
    )
    model.generation_config = GenerationConfig(**sampled)
    model.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path)
    output = again.generate(ids, generator=generators(3), return_dict_in_generate=True)
    assert continuations(output, ids.shape[1]) == want
    assert min(map(len, want)) < 20 and all(MASK not in row for row in want)


def test_their_generation_config_loads(tmp_path: Path) -> None:
    """End-of-text tokens and sampling settings of a foreign folder are used as they are there."""
    other = theirs("llama")
    other.generation_config = GenerationConfig(eos_token_id=[3, 4], pad_token_id=0, do_sample=False)
    ours = loaded(other, tmp_path)
    ids, real = padded(ROWS, "left")
    got: Tensor = ours.generate(ids, real, max_new_tokens=40)
    want = other.generate(ids, attention_mask=real, max_new_tokens=40)
    assert torch.equal(got[:, ids.shape[1] :], want[:, ids.shape[1] :])
    assert (got[:, ids.shape[1] :] == 0).any() or got.shape[1] < ids.shape[1] + 40
