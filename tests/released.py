"""Tiny checkpoints in exactly the form in which others release theirs, and a slow model written from what the formats'
descriptions say rather than from the code."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from oracles import MASK, VOCABULARY
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

# --- What the formats look like -------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 100.0, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "attention_dropout": 0.0,
}  # fmt: skip
QWEN: dict[str, Any] = {**COMMON, "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 2}
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7,
}  # fmt: skip
OLMO: dict[str, Any] = {
    "vocab_size": VOCABULARY - 4, "embedding_size": VOCABULARY, "d_model": 24, "mlp_hidden_size": 20, "mlp_ratio": 4,
    "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_sequence_length": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 100.0, "weight_tying": False, "block_type": "llama", "layer_norm_type": "rms", "rope": True,
    "activation_type": "silu", "alibi": False, "attention_layer_norm": False, "bias_for_layer_norm": False,
    "block_group_size": 1, "include_bias": False, "include_qkv_bias": False, "input_emb_norm": False,
    "layer_norm_with_affine": True, "multi_query_attention": None, "scale_logits": False, "init_std": 0.02,
    "eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "float32", "mask_token_id": MASK,
}  # fmt: skip

NAMES = {
    "embedding": "model.embed_tokens", "final": "model.norm", "head": "lm_head",
    "before": "model.layers.{}.input_layernorm", "between": "model.layers.{}.post_attention_layernorm",
    "query": "model.layers.{}.self_attn.q_proj", "key": "model.layers.{}.self_attn.k_proj",
    "value": "model.layers.{}.self_attn.v_proj", "out": "model.layers.{}.self_attn.o_proj",
    "query norm": "model.layers.{}.self_attn.q_norm", "key norm": "model.layers.{}.self_attn.k_norm",
    "gate": "model.layers.{}.mlp.gate_proj", "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}  # fmt: skip
ENCODER = {k: v.replace("model.", "encoder.") for k, v in NAMES.items()} | {"head": "diffusion_head"}
TRANSFORMER = {
    "embedding": "model.transformer.wte", "final": "model.transformer.ln_f", "head": "model.transformer.ff_out",
    "before": "model.transformer.blocks.{}.attn_norm", "between": "model.transformer.blocks.{}.ff_norm",
    "query": "model.transformer.blocks.{}.q_proj", "key": "model.transformer.blocks.{}.k_proj",
    "value": "model.transformer.blocks.{}.v_proj", "out": "model.transformer.blocks.{}.attn_out",
    "gate": "model.transformer.blocks.{}.ff_proj", "up": "model.transformer.blocks.{}.up_proj",
    "down": "model.transformer.blocks.{}.ff_out",
}  # fmt: skip

GGUF = {
    "embedding": "token_embd", "final": "output_norm", "head": "output", "before": "blk.{}.attn_norm",
    "between": "blk.{}.ffn_norm", "query": "blk.{}.attn_q", "key": "blk.{}.attn_k", "value": "blk.{}.attn_v",
    "out": "blk.{}.attn_output", "gate": "blk.{}.ffn_gate", "up": "blk.{}.ffn_up", "down": "blk.{}.ffn_down",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A released checkpoint: its config.json and names of weights, and in our words what that means.

    Attributes:
        like: transformers' configuration of the same shape.
        mask: the mask token, None for a pure AR model.
        clean: how clean text is seen: "causal", "block" (of `block` tokens) or "full".
        length: how long a text shows all there is to see.
        joined: what the file has as one, one below the other.
    """

    config: dict[str, Any]
    names: dict[str, str]
    like: type[PreTrainedConfig]
    head_dim: int = 6
    bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    mask: int | None = None
    clean: str = "causal"
    block: int = 0
    prediction: str = "in_place"
    length: int = 13
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)


def json_of(config: dict[str, Any], model_type: str, **more: Any) -> dict[str, Any]:
    return {**config, "model_type": model_type, **more}


CODE = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
NEMOTRON = {k: v for k, v in COMMON.items() if k != "rope_theta"} | CODE | {
    "architectures": ["NemotronLabsDiffusionModel"], "head_dim": 8, "max_position_embeddings": 64,
    "sliding_window": None, "attention_bias": False, "mlp_bias": False, "rope_parameters": YARN,
    "mask_token_id": MASK, "block_size": 5, "dlm_paradigm": "bidirectional",
}  # fmt: skip
CASES = {
    "llama": Case(config=json_of(COMMON, "llama", attention_bias=False, mlp_bias=False), names=NAMES, like=LlamaConfig),
    "smollm": Case(config=json_of(COMMON, "llama", tie_word_embeddings=True), names=NAMES, like=LlamaConfig, tied=True),
    "mistral": Case(
        config=json_of(COMMON, "mistral", sliding_window=None, head_dim=8), names=NAMES, like=MistralConfig, head_dim=8
    ),
    "qwen2": Case(config=json_of(QWEN, "qwen2"), names=NAMES, like=Qwen2Config, bias=True),
    "qwen3": Case(
        config=json_of(QWEN, "qwen3", head_dim=8), names=NAMES, like=Qwen3Config, head_dim=8, qk_norm=True
    ),
    "phi3": Case(
        config=json_of(COMMON, "phi3", sliding_window=None, resid_pdrop=0.0, embd_pdrop=0.0, rope_scaling=None,
                       original_max_position_embeddings=256, **CODE),
        names=NAMES | {"joint": "model.layers.{}.self_attn.qkv_proj", "both": "model.layers.{}.mlp.gate_up_proj"},
        like=LlamaConfig, joined={"joint": ("query", "key", "value"), "both": ("gate", "up")},
    ),
    "nemotron": Case(
        config=json_of(NEMOTRON, "nemotron_labs_diffusion"), names=ENCODER, like=Ministral3Config, head_dim=8,
        mask=MASK, block=5, length=50,
    ),
    "sdar": Case(
        config=json_of(QWEN, "sdar", head_dim=8, mask_token_id=MASK, block_size=3, **CODE),
        names=NAMES, like=Qwen3Config, head_dim=8, qk_norm=True, mask=MASK, clean="block", block=3,
    ),
    "fast-dllm v2": Case(
        config=json_of(QWEN, "Fast_dLLM_Qwen", tie_word_embeddings=True, mask_token_id=MASK, bd_size=3, **CODE),
        names=NAMES, like=Qwen2Config, bias=True, tied=True, mask=MASK, clean="block", block=3, prediction="next",
    ),
    "dream": Case(
        config=json_of(QWEN, "Dream", architectures=["DreamModel"], mask_token_id=MASK, use_mrope=False, **CODE),
        names=NAMES, like=Qwen2Config, bias=True, mask=MASK, clean="full", prediction="next",
    ),
    "llada": Case(
        config=json_of(OLMO, "llada", **CODE), names=TRANSFORMER, like=LlamaConfig, mask=MASK, clean="full"
    ),
}  # fmt: skip


def weights_of(case: Case) -> dict[str, Tensor]:
    """Random weights by what they are; layer i's end in " i"."""
    draw = torch.Generator().manual_seed(1)
    wide, inner, heads, groups = 24, 20, 4 * case.head_dim, 2 * case.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (VOCABULARY, wide), "final": (wide,)}
    if not case.tied:
        shapes["head"] = (VOCABULARY, wide)
    layer = {
        "before": (wide,), "between": (wide,), "query": (heads, wide), "key": (groups, wide), "value": (groups, wide),
        "out": (wide, heads), "gate": (inner, wide), "up": (inner, wide), "down": (wide, inner),
    }  # fmt: skip
    layer |= {"query norm": (case.head_dim,), "key norm": (case.head_dim,)} if case.qk_norm else {}
    layer |= {"query bias": (heads,), "key bias": (groups,), "value bias": (groups,)} if case.bias else {}
    shapes |= {f"{what} {i}": shape for i in range(2) for what, shape in layer.items()}
    return {what: torch.randn(shape, generator=draw) * 0.25 + (len(shape) == 1) for what, shape in shapes.items()}


def named(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The same by their names in a file."""
    tensors = {}
    for what, weight in weights.items():
        what, _, layer = what.rpartition(" ") if what[-1].isdigit() else (what, "", "")
        kind = "bias" if what.endswith(" bias") else "weight"
        tensors[f"{names[what.removesuffix(' bias')].format(layer)}.{kind}"] = weight
    return tensors


def filed(case: Case) -> dict[str, Tensor]:
    """The weights as they are in a file."""
    weights = weights_of(case)
    for joint, parts in case.joined.items():
        for i in range(2):
            weights[f"{joint} {i}"] = torch.cat([weights.pop(f"{part} {i}") for part in parts])
    return named(weights, case.names)


def written(case: Case, folder: Path, shards: int = 1, **changes: Any) -> Path:
    """The folder as it would come from the hub, with code in it that must not run."""
    folder.mkdir(exist_ok=True)
    tensors = filed(case)
    (folder / "config.json").write_text(json.dumps(case.config | changes))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        sharded(tensors, folder, shards)
    return folder


def sharded(tensors: dict[str, Tensor], folder: Path, shards: int) -> None:
    """In so many files, in turns, and no other."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({k: v for k, v in tensors.items() if where[k] == file}, folder / file, {"format": "pt"})
    size = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- What the models compute, slowly --------------------------------------------------------------


def frequencies(case: Case) -> list[float]:
    """RoPE's (arXiv 2104.09864), or YaRN's (arXiv 2309.00071): waves that turn often within the first length stay as
    they are, those that turn less than once are stretched, and between the two it changes evenly from wave to wave."""
    yarn = case.config.get("rope_parameters")
    size, base = case.head_dim, (yarn or case.config)["rope_theta"]
    plain = [base ** (-2 * i / size) for i in range(size // 2)]
    if yarn is None:
        return plain

    def wave(turns: float) -> float:
        return size * math.log(yarn["original_max_position_embeddings"] / (2 * math.pi * turns)) / (2 * math.log(base))

    first, last = max(math.floor(wave(yarn["beta_fast"])), 0), min(math.ceil(wave(yarn["beta_slow"])), size - 1)
    shares = [min(max((i - first) / (last - first), 0), 1) for i in range(size // 2)]
    return [f * (1 - share) + f / yarn["factor"] * share for f, share in zip(plain, shares, strict=True)]


def turned(x: Tensor, case: Case) -> Tensor:
    """`[T, heads, D]`: pairs i and i + D/2 turned by position times frequency, in float32 as it is everywhere."""
    out, half = torch.empty_like(x), case.head_dim // 2
    for place in range(len(x)):
        for i, frequency in enumerate(frequencies(case)):
            a, b = x[place, :, i], x[place, :, i + half]
            angle = torch.tensor(float(place)) * torch.tensor(frequency)
            out[place, :, i], out[place, :, i + half] = (
                a * angle.cos() - b * angle.sin(),
                a * angle.sin() + b * angle.cos(),
            )
    return out


def sees(case: Case, query: int, key: int) -> bool:
    if case.clean == "block":
        return key // case.block <= query // case.block
    return case.clean == "full" or key <= query


def slow_logits(case: Case, ids: list[int]) -> Tensor:
    """`[T, V]` in float64 for clean text."""
    w = {name: x.double() for name, x in weights_of(case).items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x, count = w["embedding"][ids], len(ids)
    mask = torch.tensor([[sees(case, q, k) for k in range(count)] for q in range(count)])
    for i in range(2):
        h = norm(x, w[f"before {i}"])
        q, k, v = (
            (h @ w[f"{name} {i}"].T + w.get(f"{name} bias {i}", 0.0)).view(count, -1, case.head_dim)
            for name in ("query", "key", "value")
        )
        if case.qk_norm:
            q, k = norm(q, w[f"query norm {i}"]), norm(k, w[f"key norm {i}"])
        q, k = turned(q, case), turned(k, case)
        yarn = case.config.get("rope_parameters")
        if yarn is not None:
            limit, beta = yarn["original_max_position_embeddings"], yarn["llama_4_scaling_beta"]
            q = q * torch.tensor([1 + beta * math.log(1 + place // limit) for place in range(count)])[:, None, None]
        heads = []
        for head in range(4):
            scores = q[:, head] @ k[:, head // 2].T / math.sqrt(case.head_dim)
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v[:, head // 2])
        x = x + torch.cat(heads, -1) @ w[f"out {i}"].T
        h = norm(x, w[f"between {i}"])
        gate = h @ w[f"gate {i}"].T
        x = x + (gate * gate.sigmoid() * (h @ w[f"up {i}"].T)) @ w[f"down {i}"].T
    return norm(x, w["final"]) @ w["embedding" if case.tied else "head"].T
