"""`HybridConfig`: transformers' Llama field names, and five fields that make a hybrid of it."""

import math
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
        self._check()

    def _check(self) -> None:
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            good = is_number(value) and 0 <= value < math.inf
            require(good, f"{name} is {value!r}; it must be a number of at least 0.")
        for name in (
            "attention_bias", "tie_word_embeddings", "qk_norm", "mlp_bias", "mlp_gate", "scale_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} is {value!r}; it must be true or false.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"):
            value = getattr(self, name)
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            require(
                all(i is None or is_whole(i, -math.inf) for i in ids),
                f"{name} is {value!r}; it must be the id of a token, or null.",
            )
        for name, known in (("hidden_act", ACTIVATIONS), ("norm", NORMS)):
            value = getattr(self, name)
            require(
                isinstance(value, str) and value in known, f"{name} is {value!r}; use one of {', '.join(known)}."
            )
        value = self.rope_parameters
        require(value is None or isinstance(value, dict), f"rope_parameters is {value!r}; it must be an object.")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "block_size",
        ):  # fmt: skip
            value = getattr(self, name)
            require(is_whole(value, 1), f"{name} is {value!r}; it must be a whole number of at least 1.")
        words = self.draft_words if isinstance(self.draft_words, list) else None
        for name in ("draft_head_size", "draft_words", "draft_rank"):
            value = len(words) if words is not None and name == "draft_words" else getattr(self, name)
            require(value is None or is_whole(value, 1), f"{name} is {value!r}; use a whole number, or null.")
        require(
            self.draft_head_size is None or (self.mask_token_id is not None and self.clean_attention == "causal"),
            f"draft_head_size is {self.draft_head_size}, and only a model that drafts and verifies has a head on its "
            "drafts: give a mask_token_id and clean_attention='causal', or leave it out.",
        )
        most = self.vocab_size - 1  # the mask is no guess
        require(
            self.draft_words is None or self.draft_head_size is not None,
            "draft_words says what a head can guess at: it goes with draft_head_size.",
        )
        require(
            not isinstance(self.draft_words, int) or self.draft_words <= most,
            f"draft_words is {self.draft_words}; it is at most {most}, all tokens of the vocabulary but the mask.",
        )
        require(
            all(
                isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= most and i != self.mask_token_id
                for i in words or ()
            ) and len({*(words or ())}) == len(words or ()),
            f"draft_words must be different ids of the vocabulary (0 to {most}) without the mask's.",
        )
        require(
            self.draft_rank is None or self.draft_head_size is not None,
            f"draft_rank is {self.draft_rank}; it goes with draft_head_size.",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
            f"({self.num_attention_heads}): each key head serves a whole group of query heads.",
        )
        require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even.")
        require(
            self.mask_token_id is None or 0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id is {self.mask_token_id}; it must lie in the vocabulary (0 to {self.vocab_size - 1}).",
        )
        require(
            self.clean_attention in ("causal", "block", "full"),
            f"clean_attention is {self.clean_attention!r}; use 'causal', 'block' or 'full'.",
        )
        require(
            self.diffusion_prediction in ("in_place", "next"),
            f"diffusion_prediction is {self.diffusion_prediction!r}; use 'in_place' or 'next'.",
        )
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type", "default")
        types = ", ".join(map(repr, ROPE))
        require(not any(isinstance(x, dict) for x in rope.values()), "rope_parameters differ from layer to layer.")
        require(
            rope_type not in LENGTH_DEPENDENT_ROPE,
            f"rope_parameters has rope_type {rope_type!r}, whose frequencies change with the length of the "
            f"text, so that no cache is exact; use one of {types}.",
        )
        require(rope_type in ROPE, f"rope_parameters has rope_type {rope_type!r}; use one of {types}.")
        part = rope.get("partial_rotary_factor")
        require(part in (None, 1), f"rope_parameters has partial_rotary_factor {part!r}: here whole heads are rotated.")
        base = rope.get("rope_theta", 1.0)
        require(is_number(base) and math.isfinite(base), f"rope_parameters has rope_theta {base!r}.")
        if rope_type != "default":
            try:
                with torch.device("cpu"):  # whatever device a model is being made for
                    ROPE_INIT_FUNCTIONS[rope_type](self)
            except (ArithmeticError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"rope_parameters: rope_type {rope_type!r} cannot be computed from {rope}: "
                    f"{type(error).__name__} {error}."
                ) from error
        require(
            not rope.get("llama_4_scaling_beta") or rope.get("original_max_position_embeddings", 0) >= 1,
            "rope_parameters has llama_4_scaling_beta, which needs original_max_position_embeddings beside it.",
        )

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


AutoConfig.register("hybrid", HybridConfig)
