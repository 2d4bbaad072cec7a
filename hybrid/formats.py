"""Which checkpoints load, and as what: our own, and the families whose weights have our names already.

A format is a function from its configuration to ours. What the backbone does not have is refused here, before
any weight is read.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hybrid.config import HybridConfig

SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
)  # fmt: skip

# What else each family is, beyond the fields that it shares with us.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}

# Field, the only value that we can run, and what another one would mean.
REFUSED = (
    ("hidden_act", "silu", "another activation than SiLU"),
    ("mlp_bias", False, "biases in the MLP"),
    ("attention_bias", False, "a bias on the attention's output"),
    ("attention_dropout", 0.0, "attention dropout"),
    ("use_sliding_window", False, "sliding-window attention"),
)


def translate(foreign: PreTrainedConfig) -> HybridConfig:
    """Our configuration for a Llama, Qwen2 or Qwen3 one: a pure AR model, ready to be converted.

    Raises:
        ValueError: another family, or a feature that the backbone does not have.
    """
    family = foreign.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not a format that hybrid loads; it knows hybrid, {', '.join(FAMILIES)}."
        )
    for field, only, meaning in REFUSED:
        value = getattr(foreign, field, only)
        if value is not None and value != only:
            raise ValueError(f"config.{field} is {value!r}: {meaning}, which this backbone does not have.")
    if "sliding_attention" in (getattr(foreign, "layer_types", None) or ()):
        raise ValueError("config.layer_types has sliding_attention, which this backbone does not have.")
    fields = {name: getattr(foreign, name) for name in SHARED if getattr(foreign, name, None) is not None}
    return HybridConfig(**fields, **FAMILIES[family])


def config_for(source: Any, kwargs: dict[str, Any]) -> tuple[HybridConfig, dict[str, Any]]:
    """The configuration of a checkpoint, with fields that `kwargs` overrides, and the rest of `kwargs`."""
    hub = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
    config = AutoConfig.from_pretrained(source, **{k: kwargs[k] for k in hub if k in kwargs})
    if not isinstance(config, HybridConfig):
        config = translate(config)
    own = {k: v for k, v in kwargs.items() if k in HybridConfig.__annotations__}
    if own:
        config = HybridConfig(**{**config.to_dict(), **own})
    return config, {k: v for k, v in kwargs.items() if k not in own}
