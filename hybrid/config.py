"""`HybridConfig`: transformers' Llama field names, and five fields that make a hybrid of it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybrid.common.checks import is_number, is_whole, require
from hybrid.parts import ACTIVATIONS, NORMS

# Their frequencies depend on the length of the text so far, so a cached key would have been rotated by
# another law than a fresh one: no cache could be exact.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
ROPE = ("default", "linear", "yarn", "llama3")


def _one_of(*known: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in known


def _is_token(value: Any) -> bool:
    return value is None or is_whole(value, -math.inf)


def _is_size(value: Any) -> bool:
    return is_whole(value, 1)


# Fields, what each may be by itself, and how a refusal says so. What they may be together is checked below the class.
FIELDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
     "max_position_embeddings block_size", _is_size, "it must be a whole number of at least 1"),
    ("rms_norm_eps initializer_range", lambda x: is_number(x) and 0 <= x < math.inf,
     "it must be a number of at least 0"),
    ("attention_bias tie_word_embeddings qk_norm mlp_bias mlp_gate scale_embeddings",
     lambda x: isinstance(x, bool), "it must be true or false"),
    ("bos_token_id pad_token_id mask_token_id", _is_token, "it must be the id of a token, or null"),
    ("eos_token_id", lambda x: all(map(_is_token, x if isinstance(x, list) else [x])),
     "it must be the id of a token, or null"),
    ("hidden_act", _one_of(*ACTIVATIONS), f"use one of {', '.join(ACTIVATIONS)}"),
    ("norm", _one_of(*NORMS), f"use one of {', '.join(NORMS)}"),
    ("clean_attention", _one_of("causal", "block", "full"), "use 'causal', 'block' or 'full'"),
    ("diffusion_prediction", _one_of("in_place", "next"), "use 'in_place' or 'next'"),
    ("rope_parameters", lambda x: x is None or isinstance(x, dict), "it must be an object"),
    ("draft_head_size draft_rank", lambda x: x is None or _is_size(x), "use a whole number, or null"),
    ("draft_words", lambda x: x is None or _is_size(len(x) if isinstance(x, list) else x),
     "use a whole number, or null"),
)  # fmt: skip


class HybridConfig(PreTrainedConfig):
    """Settings of one hybrid backbone.

    The fields down to `tie_word_embeddings` mean what they mean in transformers' `LlamaConfig`.

    Args:
        rope_parameters: transformers' own, with one more that Ministral 3 has there: `llama_4_scaling_beta` multiplies
            rotated queries by 1 + beta ln(1 + floor(position / original_max_position_embeddings)).
        attention_bias: biases on the query, key and value projections (Qwen2); the output has none.
        hidden_act: activation of the MLP: one of `hybrid.parts.ACTIVATIONS`.
        mlp_bias: biases on all projections of the MLP.
        mlp_gate: the MLP has a gate, as SwiGLU has.
        norm: one of `hybrid.parts.NORMS`: "rms" (Llama), "rms_offset" (Gemma), "layer_bare" (OLMo); `rms_norm_eps` is
            that of each.
        scale_embeddings: embeddings are multiplied by the root of hidden_size (Gemma).
        qk_norm: RMSNorm over each head's query and key before rotation (Qwen3).
        mask_token_id: the id that stands for "not known yet"; None is a pure autoregressive model.
        block_size: default window of `block` and `speculative` decoding, in tokens.
        clean_attention: how clean text sees itself: "causal" (Nemotron-Labs-Diffusion), "block" (causal
            between blocks of `block_size`, bidirectional inside: SDAR, BD3-LM) or "full" (LLaDA, Dream).
        diffusion_prediction: a masked slot's logits predict that slot's own token ("in_place") or the one
            after it ("next", Dream and Fast-dLLM v2).
        draft_head_size: inner size of a head that guesses ahead for `speculative` (`hybrid.adapters.draft_head`); None:
            drafts are read off masks.
        draft_words: tokens that head can guess at: ids, or how many of the first; None: all.
        draft_rank: of that head's output; None: its default.

    Raises:
        ValueError: a field is out of range, or asks for something that the backbone does not have.
    """

    model_type = "hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers declares it so)
    ignore_keys_at_rope_validation = {"llama_4_scaling_beta"}  # noqa: RUF012 (likewise)

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    # None stands for "as many as query heads" and "hidden_size / num_attention_heads" until both are filled in.
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    qk_norm: bool = False
    hidden_act: str = "silu"
    mlp_bias: bool = False
    mlp_gate: bool = True
    norm: str = "rms"
    scale_embeddings: bool = False
    mask_token_id: int | None = None
    block_size: int = 8
    clean_attention: str = "causal"
    diffusion_prediction: str = "in_place"
    draft_head_size: int | None = None
    draft_words: int | list[int] | None = None
    draft_rank: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // (self.num_attention_heads or 1)  # 0 is refused below
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
        for names, good, said in FIELDS:
            for name in names.split():
                value = getattr(self, name)
                require(good(value), f"{name} is {value!r}; {said}.")
        _check_sizes(self)
        _check_draft_head(self)
        _check_rope(self)

    def but(self, **fields: Any) -> "HybridConfig":
        """The same with other values of some fields.

        Raises:
            ValueError: they do not go together.
        """
        return HybridConfig(**{**self.to_dict(), **fields})

    @property
    def query_scaling(self) -> tuple[float, int] | None:
        """Beta and the positions that are not scaled yet, or None where queries are not scaled at all."""
        rope = self.rope_parameters or {}
        beta = rope.get("llama_4_scaling_beta")
        return (beta, rope["original_max_position_embeddings"]) if beta else None

    @property
    def is_hybrid(self) -> bool:
        """Whether the model can draft at all: it has a mask token."""
        return self.mask_token_id is not None


def _check_sizes(config: HybridConfig) -> None:
    require(
        config.num_attention_heads % config.num_key_value_heads == 0,
        f"num_key_value_heads ({config.num_key_value_heads}) must divide num_attention_heads "
        f"({config.num_attention_heads}): each key head serves a whole group of query heads.",
    )
    require(config.head_dim % 2 == 0, f"head_dim is {config.head_dim}; RoPE rotates pairs, so it must be even.")
    require(
        config.mask_token_id is None or 0 <= config.mask_token_id < config.vocab_size,
        f"mask_token_id is {config.mask_token_id}; it must lie in the vocabulary (0 to {config.vocab_size - 1}).",
    )


def _check_draft_head(config: HybridConfig) -> None:
    size, words, most = config.draft_head_size, config.draft_words, config.vocab_size - 1  # the mask is no guess
    require(
        size is None or (config.mask_token_id is not None and config.clean_attention == "causal"),
        f"draft_head_size is {size}, and only a model that drafts and verifies has a head on its drafts: give a "
        "mask_token_id and clean_attention='causal', or leave it out.",
    )
    require(
        words is None or size is not None, "draft_words says what a head can guess at: it goes with draft_head_size."
    )
    if isinstance(words, list):
        known = all(is_whole(i) and i <= most and i != config.mask_token_id for i in words)
        require(
            known and len({*words}) == len(words),
            f"draft_words must be different ids of the vocabulary (0 to {most}) without the mask's.",
        )
    require(
        not isinstance(words, int) or words <= most,
        f"draft_words is {words}; it is at most {most}, all tokens of the vocabulary but the mask.",
    )
    rank = config.draft_rank
    require(rank is None or size is not None, f"draft_rank is {rank}; it goes with draft_head_size.")


def _check_rope(config: HybridConfig) -> None:
    rope = config.rope_parameters or {}
    kind, types = rope.get("rope_type", "default"), ", ".join(map(repr, ROPE))
    require(not any(isinstance(x, dict) for x in rope.values()), "rope_parameters differ from layer to layer.")
    require(
        kind not in LENGTH_DEPENDENT_ROPE,
        f"rope_parameters has rope_type {kind!r}, whose frequencies change with the length of the text, so that no "
        f"cache is exact; use one of {types}.",
    )
    require(kind in ROPE, f"rope_parameters has rope_type {kind!r}; use one of {types}.")
    part, base = rope.get("partial_rotary_factor"), rope.get("rope_theta", 1.0)
    require(part in (None, 1), f"rope_parameters has partial_rotary_factor {part!r}: here whole heads are rotated.")
    require(is_number(base) and math.isfinite(base), f"rope_parameters has rope_theta {base!r}.")
    if kind != "default":
        try:
            with torch.device("cpu"):  # whatever device a model is being made for
                ROPE_INIT_FUNCTIONS[kind](config)
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"rope_parameters: rope_type {kind!r} cannot be computed from {rope}: {type(error).__name__} {error}."
            ) from error
    require(
        not rope.get("llama_4_scaling_beta") or rope.get("original_max_position_embeddings", 0) >= 1,
        "rope_parameters has llama_4_scaling_beta, which needs original_max_position_embeddings beside it.",
    )


AutoConfig.register("hybrid", HybridConfig)
