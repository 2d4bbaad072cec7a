"""What cannot work is refused before any work, in words that name the field and say what to do."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import MASK, VOCABULARY, cached, continuations, generators, late, padded, texts, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hybrid import HybridConfig, HybridForCausalLM, Layout
from hybrid.checkpoints.tensorfile import CheckpointError

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])
NAN, INFINITE = float("nan"), float("inf")


def refused(words: str, act: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    """`act` must raise an error with all these words in its message."""
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    missing = [word for word in words.split() if word not in message]
    assert not missing, f"{missing} not in: {message}"


def declined(words: str, model: HybridForCausalLM, *arguments: Any, **options: Any) -> None:
    """`generate` must refuse these arguments."""
    refused(words, lambda: model.generate(*arguments, **options))


# --- The prompt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative"])
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (None, "input_ids missing"),
        (torch.zeros(1, 0, dtype=torch.int64), "input_ids empty at least one"),
        (torch.zeros(0, 3, dtype=torch.int64), "input_ids"),
        (torch.tensor([1, 2, 3]), "input_ids shape [batch, length]"),
        (torch.tensor([[0.5, 1.0]]), "input_ids dtype whole"),
        (torch.tensor([[1, 2], [3, VOCABULARY]]), f"input_ids[1, 1] {VOCABULARY} vocabulary tokenizer"),
        (torch.tensor([[1, -1]]), "input_ids[0, 1] -1 vocabulary"),
        (torch.tensor([[1, MASK, 2]]), f"input_ids[0, 1] mask token {MASK} leave"),
    ],
)
def test_prompts(mode: str, ids: Tensor | None, words: str) -> None:
    refused(words, lambda: tiny().generate(ids, mode=mode))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.tensor([[1, 1, 1], [0, 0, 0]]), "input_ids row 1 empty"),
        (torch.ones(2, 4, dtype=torch.int64), "attention_mask shape (2, 4) input_ids (2, 3)"),
        (torch.ones(3, dtype=torch.int64), "attention_mask shape"),
    ],
)
def test_attention_masks(mask: Tensor, words: str) -> None:
    refused(words, lambda: tiny().generate(PROMPT, mask))


def test_what_stands_in_the_padding_is_nobodys_business() -> None:
    ids = torch.tensor([[-100, 1, 2], [MASK, 3, 4]])
    new = tiny().generate(ids, torch.tensor([[0, 1, 1], [0, 1, 1]]), max_new_tokens=2)
    assert torch.equal(new[:, :3], ids)


def test_prompts_longer_than_the_context() -> None:
    model = tiny(max_position_embeddings=8)
    long = torch.tensor(texts(0, [8]))
    declined("prompt 8 max_position_embeddings shorten", model, long)
    declined("max_new_tokens 4 5 context 8 room for 3", model, long[:, :5], max_new_tokens=4)
    assert model.generate(long[:, :5], max_new_tokens=3).shape == (1, 8)
    assert model.generate(long[:, :5]).shape == (1, 8)  # by default, what there is room for


# --- Options of generate --------------------------------------------------------------------------

SAMPLED: dict[str, Any] = {"do_sample": True}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "turbo"}, "mode 'turbo' 'ar' 'block' 'diffusion' 'speculative'"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 above"),
        ({"max_new_tokens": -3}, "max_new_tokens -3 above"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5 whole"),
        ({"max_length": 3}, "max_length 3"),
        ({"num_return_sequences": 0}, "num_return_sequences 0 whole above 0"),
        ({**SAMPLED, "temperature": NAN}, "temperature nan finite"),
        ({**SAMPLED, "temperature": INFINITE}, "temperature inf finite"),
        ({**SAMPLED, "temperature": -1.0}, "temperature -1.0 above 0"),
        ({**SAMPLED, "top_p": 0.0}, "top_p 0.0 (0, 1]"),
        ({**SAMPLED, "top_p": 1.5}, "top_p 1.5 (0, 1]"),
        ({**SAMPLED, "top_p": NAN}, "top_p nan"),
        ({**SAMPLED, "top_k": -1}, "top_k -1"),
        ({**SAMPLED, "min_p": 2.0}, "min_p 2.0 [0, 1]"),
        ({"mode": "block", "block_size": 0}, "block_size 0 above"),
        ({"mode": "block", "block_size": 10_000}, "block_size 10000 context"),
        ({"mode": "speculative", "block_size": 1}, "block_size speculative 2"),
        ({"generator": generators(3)}, "generator 2 rows 3"),
        ({"generator": [1, 2]}, "generator torch.Generator"),
        ({"mode": "block", "reveal": "magic"}, "reveal 'magic' 'steps' 'threshold' function"),
        ({"mode": "block", "confidence_threshold": 0.0}, "confidence_threshold 0.0 (0, 1]"),
        ({"mode": "block", "confidence_threshold": NAN}, "confidence_threshold nan (0, 1]"),
        ({"mode": "block", "steps_per_block": 0}, "steps_per_block 0 at least 1"),
        (
            {"mode": "block", "reveal": "steps", "confidence_threshold": 0.5},
            "confidence_threshold 'threshold' 'steps'",
        ),
        (
            {"mode": "block", "reveal": "threshold", "steps_per_block": 2},
            "steps_per_block 'steps' 'threshold'",
        ),
        (
            {"mode": "block", "reveal": lambda c, _: c, "steps_per_block": 2},
            "steps_per_block reveal function",
        ),
        (
            {"mode": "block", "steps_per_block": 2, "confidence_threshold": 0.5},
            "steps_per_block 'steps' confidence_threshold 'threshold'",
        ),
        (
            {"mode": "block", "confidence_factor": 0.5, "entropy_bound": 0.1},
            "confidence_factor 'factor' entropy_bound 'entropy_bound' leave one out",
        ),
        (
            {"mode": "block", "confidence_factor": 0.5, "steps_per_block": 2},
            "steps_per_block 'steps' means reveal='factor'",
        ),
        ({"mode": "ar", "confidence_threshold": 0.5}, "confidence_threshold mode='ar' 'block' 'diffusion'"),
        ({"mode": "speculative", "fused": True, "steps_per_block": 2}, "steps_per_block fused one draft a round"),
        ({"mode": "speculative", "fused": True, "drafts_per_round": 2}, "drafts_per_round 2 fused"),
        ({"mode": "speculative", "drafts_per_round": 0}, "drafts_per_round 0 above"),
        ({"mode": "speculative", "drafts_per_round": 1, "reveal": "margin"}, "reveal drafts_per_round=1"),
        ({"mode": "block", "drafts_per_round": 2}, "drafts_per_round speculative 'block'"),
        ({"mode": "block", "num_beams": 2}, "num_beams mode='ar' 'block'"),
        ({"mode": "speculative", "num_beams": 3}, "num_beams mode='ar' 'speculative'"),
        ({"num_beams": 2, "generator": generators(1)[0]}, "num_beams generator"),
        ({"generation_config": {"max_new_tokens": 3}}, "generation_config dict GenerationConfig"),
        ({"past_key_values": DynamicCache()}, "past_key_values DynamicCache KVCache"),
        ({**SAMPLED, "temperature": "hot"}, "temperature hot"),
        ({"mode": "block", "confidence_threshold": "high"}, "confidence_threshold high"),
        ({"mode": "block", "steps_per_block": 1.5}, "steps_per_block 1.5"),
        ({"mode": "block", "dream_eps": 0}, "dream_eps 0 (0, 1)"),
        ({"mode": "block", "dream_alg": "origin"}, "dream_alg origin 'entropy'"),
        ({"mode": "block", "reveal": "quota", "confidence_threshold": 2}, "confidence_threshold 2 (0, 1]"),
        ({"mode": "block", "sub_block_size": 0}, "sub_block_size 0 above"),
        ({"mode": "block", "sub_block_size": 2, "steps_per_block": 2}, "sub_block_size 'steps' 'threshold'"),
        ({"mode": "ar", "sub_block_size": 2}, "sub_block_size mode='ar' 'block'"),
        ({"eos_token_id": "</s>"}, "eos_token_id </s>"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items())[:60] if isinstance(value, dict) else "",
)
def test_options(options: dict[str, Any], words: str) -> None:
    refused(words, lambda: tiny().generate(PROMPT, **options))


@pytest.mark.parametrize("mode", ["ar", "block"])
def test_unknown_options(mode: str) -> None:
    """A slip of the pen is not swallowed."""
    declined("confidence_treshold", tiny(), PROMPT, mode=mode, confidence_treshold=0.5)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("gen_length", "max_new_tokens"),
        ("block_length", "block_size"),
        ("threshold", "confidence_threshold"),
        ("steps", "steps_per_block"),
        ("small_block_size", "sub_block_size"),
        ("mask_id", "mask_token_id"),
    ],
)
@pytest.mark.parametrize("mode", ["ar", "block"])
def test_names_from_other_libraries(name: str, ours: str, mode: str) -> None:
    declined(f"{name} {ours}", tiny(), PROMPT, mode=mode, **{name: 8})


@pytest.mark.parametrize("mode", ["block", "diffusion", "speculative"])
def test_a_pure_ar_checkpoint_does_not_diffuse(mode: str) -> None:
    model = tiny(mask_token_id=None)
    declined(f"{mode} mask_token_id convert 'ar'", model, PROMPT, mode=mode)
    assert model.generate(PROMPT, max_new_tokens=2).shape == (2, 5)


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_what_does_not_read_left_to_right_does_not_decode_so(mode: str) -> None:
    model = tiny(clean_attention="full")
    declined(f"mode='{mode}' clean_attention='causal' 'full' mode='block'", model, PROMPT, mode=mode)
    declined("mode='ar' clean_attention", model, PROMPT)  # the default mode
    declined("block_size 8 grid 4", tiny(clean_attention="block"), PROMPT, mode="block", block_size=8)


@pytest.mark.parametrize("clean", ["block", "full"])
def test_beam_search_needs_left_to_right_too(clean: str) -> None:
    declined("clean_attention", tiny(clean_attention=clean), PROMPT, num_beams=2, max_new_tokens=3)


# --- Caches ---------------------------------------------------------------------------------------


def decoded(model: HybridForCausalLM, **options: Any) -> Any:
    return model.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative"])
def test_a_cache_of_another_text(mode: str) -> None:
    """The position of the first difference is named, and the cache is as it was."""
    model = tiny()
    first = decoded(model)
    cache, other = first.past_key_values, first.sequences.clone()
    before = list(cache.lengths)
    other[1, 2] = (other[1, 2] + 1) % MASK
    declined("past_key_values row 1 position 2", model, other, mode=mode, past_key_values=cache)
    declined("past_key_values 6 row 0 3 whole text", model, PROMPT, mode=mode, past_key_values=cache)
    one = first.sequences[:1]
    declined("past_key_values 2 rows batch 1 select", model, one, mode=mode, past_key_values=cache)
    assert cache.lengths == before and cache.active == 2
    options = {"mode": mode, "max_new_tokens": 4}
    again = model.generate(first.sequences, past_key_values=cache, **options)
    assert torch.equal(again, model.generate(first.sequences, **options))


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 1}, {"num_key_value_heads": 2}, {"head_dim": 6}])
def test_a_cache_of_another_model(fields: dict[str, Any]) -> None:
    first = decoded(tiny())
    declined("past_key_values model", tiny(**fields), first.sequences, past_key_values=first.past_key_values)


def test_a_cache_for_a_model_that_has_none() -> None:
    model = tiny(clean_attention="full")
    assert decoded(model, mode="diffusion").past_key_values is None
    declined("past_key_values full", model, PROMPT, mode="block", past_key_values=cached(model, 2))


def test_a_foreign_cache_in_a_forward() -> None:
    refused("past_key_values DynamicCache KVCache", lambda: tiny()(PROMPT, past_key_values=DynamicCache()))
    refused("token_type_ids", lambda: tiny()(PROMPT, token_type_ids=PROMPT))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input_ids": torch.tensor([1, 2, 3])}, "input_ids shape (3,) [batch, length]"),
        ({"position_ids": torch.arange(3)}, "position_ids shape (3,) (2, 3)"),
        ({"position_ids": torch.arange(4)[None]}, "position_ids shape (1, 4) (2, 3)"),
        ({"position_ids": torch.arange(3).expand(4, -1)}, "position_ids shape (4, 3) (2, 3)"),
        ({"layout": Layout.causal(torch.arange(3)[None]), "attention_mask": torch.ones(2, 3)}, "layout attention_mask"),
        ({"layout": Layout.causal(torch.arange(3)[None]), "use_cache": True}, "layout use_cache"),
        ({"layout": Layout.causal(torch.arange(3)[None]), "labels": PROMPT}, "layout labels"),
    ],
)
def test_what_a_forward_does_not_take(given: dict[str, Any], words: str) -> None:
    refused(words, lambda: tiny()(**{"input_ids": PROMPT, **given}))


def test_a_tokenizer_of_pairs_says_nothing_of_one_text() -> None:
    model = tiny()
    assert torch.equal(model(PROMPT, token_type_ids=torch.zeros_like(PROMPT)).logits, model(PROMPT).logits)


# --- After an error -------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 2, 4, 7])
@pytest.mark.parametrize("with_cache", [True, False])
def test_model_and_cache_survive_an_error_inside(fails_at: int, with_cache: bool) -> None:
    """A user's own rule raises, early or late, before or after rows have ended: the same call works then."""
    model, rows = tiny(3), texts(3, [5, 2, 7])
    ids, real = padded(rows, "left")
    first: Any = model.generate(ids, real, max_new_tokens=4, return_dict_in_generate=True)
    rows = [row + new for row, new in zip(rows, continuations(first, ids.shape[1]), strict=True)]
    text, real = padded(rows, "right")
    cache = first.past_key_values if with_cache else None
    steps = 0

    def reveal(canvas: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal steps
        steps += 1
        if steps == fails_at:
            raise RuntimeError("a user's mistake")
        return canvas.show(canvas.rank(canvas.certainty) == 0)

    options: dict[str, Any] = {"mode": "block", "max_new_tokens": 12}
    whole: Any = model.generate(text, real, steps_per_block=4, return_dict_in_generate=True, **options)
    options["eos_token_id"] = late(continuations(whole, text.shape[1])[0])
    want = model.generate(text, real, steps_per_block=4, **options)
    with pytest.raises(RuntimeError, match="a user's mistake"):
        model.generate(text, real, reveal=reveal, past_key_values=cache, **options)
    assert torch.equal(model.generate(text, real, steps_per_block=4, past_key_values=cache, **options), want)


class Broken:
    """Something of the caller's that fails when it is asked for the `fails_at`-th time."""

    def __init__(self, fails_at: int) -> None:
        self.left = fails_at

    def __call__(self, *given: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise RuntimeError("a user's mistake")
        return given[1] if len(given) > 1 and isinstance(given[1], Tensor) else False

    put = put_draft = __call__

    def end(self) -> None:
        self()


@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative"])
@pytest.mark.parametrize("what", ["streamer", "logits_processor", "stopping_criteria", "watchers"])
@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_model_and_cache_survive_what_the_caller_hands_in(mode: str, what: str, fails_at: int) -> None:
    model, options = tiny(3), {"mode": mode, "max_new_tokens": 12}
    first: Any = model.generate(PROMPT[:1], max_new_tokens=4, return_dict_in_generate=True)
    want, cache = model.generate(first.sequences, **options), first.past_key_values
    broken = Broken(fails_at)
    given = {what: broken if what == "streamer" else [broken]}
    try:
        model.generate(first.sequences, past_key_values=cache, **given, **options)
    except RuntimeError as error:
        assert "a user's mistake" in str(error)
    else:
        assert broken.left > 0 and mode == "diffusion", "it was asked less often than that"
    assert torch.equal(model.generate(first.sequences, past_key_values=first.past_key_values, **options), want)


@pytest.mark.parametrize(
    "broken",
    [
        lambda canvas: (canvas.tokens, canvas.hidden),
        lambda canvas: (canvas.tokens, torch.zeros_like(canvas.hidden)),
    ],
    ids=["shows nothing", "shows mask tokens"],
)
def test_a_rule_that_breaks_its_promise_is_named(broken: Any) -> None:
    """Each row that has a hidden slot must show at least one a step, with a token: else decoding would never
    end, or give out mask tokens."""
    calls = 0

    def reveal(canvas: Any, logits: Tensor) -> Any:
        nonlocal calls
        calls += 1
        assert calls < 200, "decoding never ends"
        return broken(canvas)

    declined("reveal", tiny(), PROMPT, mode="block", reveal=reveal, max_new_tokens=8)


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> Any:
    return HybridForCausalLM.from_pretrained(folder)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    refused(str(tmp_path / "nowhere"), lambda: load(tmp_path / "nowhere"), OSError)
    refused("config.json", lambda: load(tmp_path))  # transformers has a ValueError for it


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused("model.safetensors", lambda: load(folder), OSError)


def test_other_formats_of_weights_are_not_read(folder: Path) -> None:
    refused("use_safetensors leave it out", lambda: HybridForCausalLM.from_pretrained(folder, use_safetensors=False))
    refused("none.gguf", lambda: HybridForCausalLM.from_pretrained(folder, gguf_file="none.gguf"), OSError)


def test_a_configuration_that_holds_no_fields(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    refused("config.json list object", lambda: load(folder))


def test_a_field_of_the_caller_is_not_the_files_fault(folder: Path) -> None:
    with pytest.raises(ValueError, match="block_size is 0") as caught:
        HybridForCausalLM.from_pretrained(folder, block_size=0)
    assert not isinstance(caught.value, CheckpointError) and str(folder) not in str(caught.value)


def test_sizes_that_no_model_can_have(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 2**62}))
    refused("config.json sizes no model", lambda: load(folder))


def test_a_quantisation_that_is_not_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    refused("quantization_config awq torchao", lambda: load(folder))


def test_a_state_dict_of_the_caller_is_checked_too(folder: Path) -> None:
    config, weights = HybridConfig.from_pretrained(folder), tiny(7).state_dict()
    found = HybridForCausalLM.from_pretrained(None, config=config, state_dict=dict(weights))
    assert all(torch.equal(weight, weights[name]) for name, weight in found.state_dict().items())
    weights.pop(NORM)
    refused(
        f"state_dict missing {NORM}",
        lambda: HybridForCausalLM.from_pretrained(None, config=config, state_dict=weights),
    )


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(NORM), f"missing {NORM} config.json"),
        (lambda w: w.update(extra=torch.ones(2)), "unexpected extra config.json"),
        (lambda w: w.update({DOWN: w[DOWN][:, :3].contiguous()}), f"mismatched {DOWN} config.json"),
    ],
    ids=["missing", "extra", "mismatched"],
)
def test_weights_that_do_not_fit(folder: Path, change: Any, words: str) -> None:
    edit(folder, change)
    refused(words, lambda: load(folder))


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=re.compile("incomplete|safetensors|metadata", re.IGNORECASE)):
        load(folder)


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_not_opened(folder: Path) -> None:
    canary = folder / "canary"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    refused("safetensors", lambda: load(folder), OSError)
    assert not canary.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert canary.exists()  # it would have worked


TINY: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GPT2Config(n_embd=16, n_layer=1, n_head=2), "gpt2 hybrid llama qwen2 qwen3"),
        (Qwen2Config(**TINY, use_sliding_window=True, max_window_layers=1), "use_sliding_window sliding"),
        (Qwen2Config(**TINY, layer_types=["full_attention", "sliding_attention"]), "layer_types sliding_attention"),
        (LlamaConfig(**TINY, mlp_bias=True), "mlp_bias MLP"),
        (LlamaConfig(**TINY, attention_bias=True), "attention_bias output"),
        (LlamaConfig(**TINY, hidden_act="gelu"), "hidden_act gelu activation"),
        (
            LlamaConfig(**TINY, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "rope_parameters dynamic default linear yarn llama3",
        ),
    ],
    ids=["family", "sliding", "layer_types", "mlp_bias", "attention_bias", "activation", "rope"],
)
def test_what_the_backbone_does_not_have(config: Any, words: str, tmp_path: Path) -> None:
    """Refused from the configuration alone: there are no weights to be read."""
    config.save_pretrained(tmp_path)
    refused(words, lambda: load(tmp_path))


def test_a_foreign_model_of_the_wrong_weights(tmp_path: Path) -> None:
    """A Qwen2 folder that calls itself Llama has biases that nobody asked for, and the other way round."""
    for family, config, name, word in (
        (Qwen2ForCausalLM, Qwen2Config(**TINY), "llama", "unexpected"),
        (LlamaForCausalLM, LlamaConfig(**TINY), "qwen2", "missing"),
    ):
        family(config).save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": name}))
        refused(f"{word} bias", lambda name=name: load(tmp_path / name))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"num_attention_heads": 3, "num_key_value_heads": 2},
            "num_key_value_heads 2 num_attention_heads 3 divide",
        ),
        ({"head_dim": 7}, "head_dim 7 even"),
        ({"mask_token_id": VOCABULARY}, f"mask_token_id {VOCABULARY} vocabulary {VOCABULARY - 1}"),
        ({"mask_token_id": -1}, "mask_token_id -1 vocabulary"),
        ({"clean_attention": "bidirectional"}, "clean_attention 'bidirectional' 'causal' 'block' 'full'"),
        ({"diffusion_prediction": "shifted"}, "diffusion_prediction 'shifted' 'in_place' 'next'"),
        ({"block_size": 0}, "block_size 0 at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 at least 1"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_parameters longrope"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_configurations(fields: dict[str, Any], words: str) -> None:
    refused(words, lambda: tiny(**fields))


def test_a_configuration_is_refused_when_it_is_read(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clean_attention": "sideways"}))
    refused("clean_attention 'sideways'", lambda: load(folder))
    refused("clean_attention 'sideways'", lambda: HybridConfig.from_pretrained(folder))
