"""Released checkpoints: each loads from the form that lies on disk, says what its description says, and is saved as
ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import VOCABULARY, slowly, texts
from released import (
    CASES,
    COMMON,
    GGUF,
    NAMES,
    OLMO,
    YARN,
    Case,
    named,
    sees,
    sharded,
    slow_logits,
    weights_of,
    written,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hybrid import HybridConfig, HybridForCausalLM, HybridModel
from hybrid.checkpoints.convert import convert
from hybrid.evals.timing.loading import convert_peak
from hybrid.formats import Format, Transform, formats
from hybrid.training.text.tokenizing import train_bpe

every_format = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_format
@pytest.mark.parametrize("shards", [1, 3])
@torch.no_grad()
def test_a_folder_loads_and_says_what_its_description_says(case: Case, shards: int, tmp_path: Path) -> None:
    folder = written(case, tmp_path / "theirs", shards)
    model = HybridForCausalLM.from_pretrained(folder, dtype=torch.float64)
    config = model.config
    assert (config.mask_token_id, config.clean_attention) == (case.mask, case.clean)
    assert config.diffusion_prediction == case.prediction and case.block in (0, config.block_size)
    assert (config.bos_token_id, config.eos_token_id) == (case.config.get("bos_token_id"), 2)
    ids = texts(2, [case.length], VOCABULARY)
    torch.testing.assert_close(model(torch.tensor(ids)).logits[0], slow_logits(case, ids[0]), atol=1e-5, rtol=1e-5)
    assert not (folder / "ran").exists()


@every_format
@torch.no_grad()
def test_what_is_saved_is_ours_bit_for_bit(case: Case, tmp_path: Path) -> None:
    model = HybridForCausalLM.from_pretrained(written(case, tmp_path / "theirs"))
    assert model.dtype == torch.float32
    want = weights_of(case)
    assert torch.equal(model.model.embed_tokens.weight, want["embedding"])
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, want["down 1"])
    model.save_pretrained(tmp_path / "ours")
    again = HybridForCausalLM.from_pretrained(tmp_path / "ours")
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert {"model.norm.weight", "model.layers.1.mlp.down_proj.weight"} < names
    assert again.config.model_type == "hybrid"
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    ids = torch.tensor(texts(2, [case.length]))
    assert torch.equal(again(ids).logits, model(ids).logits)


WRITTEN = ("llama", "smollm", "mistral", "qwen2", "qwen3", "phi3", "nemotron", "sdar")


@pytest.mark.parametrize("name", WRITTEN)
@torch.no_grad()
def test_it_is_written_as_it_came(name: str, tmp_path: Path) -> None:
    """The same weights under the same names, bit for bit, and a config.json that says the same."""
    case = CASES[name]
    model = HybridForCausalLM.from_pretrained(written(case, tmp_path / "theirs"))
    ids = torch.tensor(texts(2, [case.length]))
    model.generate(ids, max_new_tokens=1, mode="block" if case.mask else "ar")  # moves weights into shared blocks
    formats()[case.config["model_type"]].write(model, tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "again"))
    assert before.keys() == after.keys() and all(torch.equal(after[key], weight) for key, weight in before.items())
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    for field in ("model_type", "rope_theta", "rope_parameters", "mask_token_id", "block_size", "head_dim"):
        assert case.config.get(field, said.get(field)) == said.get(field)
    again = HybridForCausalLM.from_pretrained(tmp_path / "again")
    same = {"_name_or_path": "", "architectures": []}
    assert again.config.to_dict() | same == model.config.to_dict() | same
    if case.mask is None:
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=False)
        assert type(other) is not HybridForCausalLM
        torch.testing.assert_close(other(ids).logits, again(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "model_type", "words"),
    [
        ("qwen3", "llama", "llama qk_norm False True"),
        ("llama", "qwen2", "qwen2 attention_bias True False"),
        ("llama", "nemotron_labs_diffusion", "mask_token_id None"),
        ("sdar", "qwen3", "clean_attention 'causal' 'block'"),
        ("nemotron", "llama", "llama scale queries rope_parameters"),
        ("llada", "llada", "llada write"),
        ("yarn", "phi3", "phi3 rope_type 'yarn'"),
        ("qwen2", "phi3", "phi3 attention_bias False True"),
    ],
)
def test_what_a_format_cannot_say_is_not_written(name: str, model_type: str, words: str, tmp_path: Path) -> None:
    changes = {"rope_scaling": {"type": "yarn", "factor": 4.0}} if name == "yarn" else {}
    folder = written(CASES["llama" if name == "yarn" else name], tmp_path / "theirs", **changes)
    model = HybridForCausalLM.from_pretrained(folder)
    refused(words, lambda: formats()[model_type].write(model, tmp_path / "never"))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name, case in CASES.items()
        for mode in ("ar", "block", "diffusion", "speculative")
        if (mode == "ar" or case.mask) and (case.clean == "causal" or mode in ("block", "diffusion"))
    ],
)
def test_it_decodes(name: str, mode: str, tmp_path: Path) -> None:
    folder = written(CASES[name], tmp_path, eos_token_id=None)
    model = HybridForCausalLM.from_pretrained(folder, dtype=torch.float64, block_size=4)
    [prompt] = texts(3, [6])
    options: dict[str, Any] = {"confidence_threshold": 0.3} if mode in ("block", "diffusion") else {}
    new = model.generate(torch.tensor([prompt]), mode=mode, max_new_tokens=9, **options)
    assert new[0, 6:].tolist() == slowly(model, prompt, 9, mode, 0.3)


@every_format
@torch.no_grad()
def test_the_slow_model_is_what_transformers_runs(case: Case) -> None:
    """Under the format's mask, with the model of that shape which transformers has: published code for all of it."""
    fields = COMMON | {"head_dim": case.head_dim, "tie_word_embeddings": case.tied, "sliding_window": None}
    rope = {"rope_parameters": case.config.get("rope_parameters", {"rope_type": "default", "rope_theta": 100.0})}
    other = AutoModelForCausalLM.from_config(case.like(**(fields | rope)), attn_implementation="sdpa").eval()
    other.load_state_dict(named(weights_of(case), NAMES), strict=not case.tied)
    ids = texts(2, [case.length], VOCABULARY)
    mask = torch.tensor([[sees(case, q, k) for k in range(case.length)] for q in range(case.length)])[None, None]
    logits = other.double()(torch.tensor(ids), attention_mask=mask).logits[0]
    torch.testing.assert_close(slow_logits(case, ids[0]), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "smollm"])
@torch.no_grad()
def test_gguf_is_read_too(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    gguf = pytest.importorskip("gguf")
    case, file = CASES[name], gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for what, value in {
        "context_length": 256, "embedding_length": 24, "block_count": 2, "feed_forward_length": 20, "head_count": 4,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 100.0, "vocab_size": VOCABULARY,
    }.items():  # fmt: skip
        getattr(file, f"add_{what}")(value)
    for key, weight in named(weights_of(case), GGUF).items():
        if "attn_q" in key or "attn_k" in key:  # the pairs that RoPE turns are neighbours there
            weight = weight.view(-1, 2, case.head_dim // 2, 24).transpose(1, 2).reshape(weight.shape)
        file.add_tensor(key, weight.numpy().copy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    ours = HybridForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", mask_token_id=7)
    want = HybridForCausalLM.from_pretrained(written(case, tmp_path))
    ids = torch.tensor(texts(2, [13], VOCABULARY))
    torch.testing.assert_close(ours(ids).logits, want(ids).logits, atol=1e-5, rtol=1e-5)
    assert ours.config.mask_token_id == 7


BIG: dict[str, Any] = {"vocab_size": 152064, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("raw", "mask", "block"),
    [
        (BIG | {"model_type": "nemotron_labs_diffusion", "head_dim": 128, "rope_parameters": YARN}, 100, 32),
        (BIG | {"model_type": "sdar"}, 151669, 4),
        (BIG | {"model_type": "sdar", "block_size": 16}, 151669, 16),
        (BIG | {"model_type": "Fast_dLLM_Qwen"}, 151665, 32),
        (BIG | {"model_type": "Fast_dLLM_Qwen", "bd_size": 8}, 151665, 8),
        (BIG | {"model_type": "Dream"}, 151666, 8),
        (
            OLMO | {"model_type": "llada", "vocab_size": 126464, "embedding_size": None, "mask_token_id": None},
            126336, 8,
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)  # fmt: skip
def test_what_config_json_may_leave_out(raw: dict[str, Any], mask: int, block: int) -> None:
    config = formats()[raw["model_type"]].config(raw)
    assert (config.mask_token_id, config.block_size) == (mask, block)
    assert config.vocab_size == raw["vocab_size"]


def neighbours(config: HybridConfig, weight: Tensor) -> list[Tensor]:
    """The pairs that RoPE turns, side by side: as Llama's own code has them."""
    size = config.head_dim // 2
    return [weight.unflatten(0, (-1, 2, size)).transpose(1, 2).flatten(0, 2)]


def halves(config: HybridConfig, weight: Tensor) -> list[Tensor]:
    return [weight.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)]


def crossed(_config: HybridConfig, before: Tensor, after: Tensor) -> list[Tensor]:
    return [before + after, before - after]


def uncrossed(_config: HybridConfig, total: Tensor, difference: Tensor) -> list[Tensor]:
    return [(total + difference) / 2, (total - difference) / 2]


LAYER = "model.layers.*."
NORM = ("input_layernorm.weight", "post_attention_layernorm.weight")
ODD = Format(
    model_type="odd", like=LlamaConfig, architecture="LlamaForCausalLM", names={"trunk": "model"},
    transforms=(
        Transform(("trunk.layers.*.turned",), (f"{LAYER}self_attn.q_proj.weight",), halves, neighbours),
        Transform(("total.*", "difference.*"), (LAYER + NORM[0], LAYER + NORM[1]), uncrossed, crossed),
        Transform(
            ("trunk.out",), ("lm_head.weight",), lambda _, out: [out.t() / 4], lambda _, out: [4 * out.t()]
        ),
    ),
)  # fmt: skip


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_weights_can_be_computed(
    shards: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in a layer's place, two of two, and one that is in no layer; what belongs together may lie in several files.
    The folder's generation settings and name come along, as with any other."""
    monkeypatch.setitem(formats(), "odd", ODD)
    want = HybridForCausalLM.from_pretrained(written(CASES["llama"], tmp_path / "theirs"))
    ODD.write(want, tmp_path / "odd")
    stored = load_file(tmp_path / "odd" / "model.safetensors")
    layer = want.model.layers[1]
    assert torch.equal(stored["trunk.out"], 4 * want.lm_head.weight.t()) and "lm_head.weight" not in stored
    assert torch.equal(stored["total.1"], layer.input_layernorm.weight + layer.post_attention_layernorm.weight)
    assert torch.equal(stored["trunk.layers.1.turned"][1], layer.self_attn.q_proj.weight[3])
    (tmp_path / "odd" / "generation_config.json").write_text('{"top_k": 3, "do_sample": true}')
    if shards > 1:
        sharded(stored, tmp_path / "odd", shards)
    model = HybridForCausalLM.from_pretrained(tmp_path / "odd", dtype=dtype)
    for name, weight in want.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight.to(dtype), atol=1e-6, rtol=1e-6)
    assert model.generation_config.top_k == 3 and model.name_or_path == str(tmp_path / "odd")
    assert model.dtype == dtype and not model.state_dict().keys() ^ want.state_dict().keys()
    for weight in model.state_dict().values():  # in memory of its own, as long as itself
        assert weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
    alone = HybridModel.from_pretrained(tmp_path / "odd")
    torch.testing.assert_close(alone.norm.weight, want.model.norm.weight)
    convert(tmp_path / "odd", tmp_path / "llama", to="llama")
    again = HybridForCausalLM.from_pretrained(tmp_path / "llama", dtype=dtype)
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in model.state_dict().items())
    refused("device_map disk", lambda: HybridForCausalLM.from_pretrained(tmp_path / "odd", device_map={"": "disk"}))


# --- One weight at a time -------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", WRITTEN)
def test_converting_gives_the_bits_that_a_model_gives(name: str, shards: int, tmp_path: Path) -> None:
    """Weights go from file to file there, and through a model here."""
    case = CASES[name]
    source, kind = written(case, tmp_path / "theirs", shards), formats()[case.config["model_type"]]
    to = {"nemotron_labs_diffusion": "nemotron"}.get(kind.model_type, kind.model_type)
    convert(source, tmp_path / "files", to=to)
    kind.write(HybridForCausalLM.from_pretrained(source), tmp_path / "model")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("files", "model"))
    assert one.keys() == other.keys() and all(torch.equal(other[key], weight) for key, weight in one.items())
    said = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("files", "model")]
    assert said[0] == said[1]


@torch.no_grad()
def test_a_format_with_a_head_of_its_own_gets_one(tmp_path: Path) -> None:
    """SGLang's loader takes no embedding for it, and would go on with whatever lay in memory."""
    tied = HybridForCausalLM.from_pretrained(written(CASES["smollm"], tmp_path / "theirs"), mask_token_id=7)
    tied.save_pretrained(tmp_path / "tied")
    convert(tmp_path / "tied", tmp_path / "files", to="nemotron")
    formats()["nemotron_labs_diffusion"].write(tied, tmp_path / "model")
    for folder in (tmp_path / "files", tmp_path / "model"):
        weights = load_file(folder / "model.safetensors")
        assert torch.equal(weights["diffusion_head.weight"], weights["encoder.embed_tokens.weight"])
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        ids = torch.tensor(texts(2, [9]))
        assert torch.equal(HybridForCausalLM.from_pretrained(folder)(ids).logits, tied(ids).logits)


@pytest.mark.slow
def test_converting_takes_the_memory_of_a_weight_and_not_of_the_model(tmp_path: Path) -> None:
    """Measured in a process of its own: 209 MB in two files; the largest weight has 25 MB."""
    fields = {
        "vocab_size": 12288, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
    }  # fmt: skip
    with torch.random.fork_rng():
        LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(tmp_path / "theirs", max_shard_size="120MB")
    train_bpe(["one two three"], 262).save_pretrained(tmp_path / "theirs")
    size = sum(path.stat().st_size for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert size > 200e6
    assert convert_peak(tmp_path / "theirs", tmp_path / "ours") < 0.5 * size
    assert convert_peak(tmp_path / "ours", tmp_path / "llama", to="llama") < 0.5 * size
    assert convert_peak(tmp_path / "ours", tmp_path / "phi3", to="phi3") < 0.5 * size
    assert convert_peak(tmp_path / "phi3", tmp_path / "again", to="llama") < 0.5 * size


# --- What is refused ------------------------------------------------------------------------------


def refused(words: str, act: Callable[[], Any]) -> None:
    with pytest.raises(ValueError) as caught:
        act()
    assert [word for word in words.split() if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mistral", {"sliding_window": 32}, "sliding_window 32"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("nemotron", {"sliding_window": 32}, "sliding_window 32"),
        ("nemotron", {"attention_bias": True}, "attention_bias"),
        ("nemotron", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
         "llama_4_scaling_beta original_max_position_embeddings"),
        ("phi3", {"sliding_window": 32}, "sliding_window 32"),
        ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 whole heads"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}},
         "longrope length cache"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "config.json rope_parameters"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop 0.1 dropout"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act gelu activation"),
        ("phi3", {"model_type": "phimoe"}, "phimoe mixture experts"),
        ("dream", {"block_size": 32}, "block_size 32 Dream"),
        ("dream", {"use_mrope": True}, "use_mrope"),
        ("dream", {"hidden_act": "gelu"}, "hidden_act gelu activation"),
        ("llada", {"block_type": "sequential"}, "block_type sequential Llama"),
        ("llada", {"block_type": None}, "block_type None"),
        ("llada", {"layer_norm_type": "gemma_rms"}, "layer_norm_type gemma_rms"),
        ("llada", {"scale_logits": True}, "scale_logits"),
        ("llada", {"include_bias": True}, "include_bias"),
        ("llada", {"activation_type": "gelu"}, "gelu activation"),
        ("llada", {"num_experts": 64, "num_experts_per_tok": 8}, "llada mixture experts"),
        ("qwen3", {"model_type": "qwen3_moe"}, "qwen3_moe mixture experts"),
        ("sdar", {"model_type": "sdar_moe", "num_experts": 128}, "sdar_moe mixture experts"),
        ("llada", {"model_type": "llada2_moe"}, "llada2_moe mixture experts"),
        ("qwen2", {"quantization_config": {"quant_method": "awq"}}, "quantization_config quantised"),
        ("llama", {"hidden_size": "wide"}, "config.json hidden_size wide"),
        ("llada", {"d_model": [24]}, "config.json hidden_size [24]"),
        ("nemotron", {"rope_parameters": {"rope_type": "yarn"}}, "config.json rope_parameters factor"),
        ("llama", {"model_type": "bd3lm"}, "bd3lm BD3-LM"),
        ("llama", {"model_type": "diffusion_gemma"}, "diffusion_gemma DiffusionGemma masks"),
        ("llama", {"model_type": "gemma3"}, "gemma3 hybrid gemma llama mistral olmo phi3 qwen2 qwen3 sdar Dream llada"),
        ("llama", {"model_type": ["llama"]}, "model_type llama"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_the_backbone_does_not_have(name: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Refused from config.json alone, in one sentence."""
    (tmp_path / "config.json").write_text(json.dumps(CASES[name].config | changes))
    refused(words, lambda: HybridForCausalLM.from_pretrained(tmp_path))


def test_a_window_that_config_json_does_not_speak_of_is_refused_too(tmp_path: Path) -> None:
    """Mistral's own default is a window of 4096."""
    config = {k: v for k, v in CASES["mistral"].config.items() if k != "sliding_window"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("sliding_window 4096", lambda: HybridForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["nemotron", "llada", "phi3"])
@pytest.mark.parametrize("problem", ["missing", "unexpected", "mismatched"])
def test_weights_are_named_as_in_the_file(name: str, problem: str, tmp_path: Path) -> None:
    case = CASES[name]
    file = written(case, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    part = "joint" if case.joined else "down"
    victim = case.names[part].format(1) + ".weight"
    if problem == "missing":
        del tensors[victim]
    elif problem == "unexpected":
        victim = case.names[part].format(7) + ".weight"
        tensors[victim] = torch.ones(24, 20)
    else:
        tensors[victim] = torch.ones(24, 19)
    save_file(tensors, file, {"format": "pt"})
    refused(f"{problem} {victim} config.json", lambda: HybridForCausalLM.from_pretrained(tmp_path))
