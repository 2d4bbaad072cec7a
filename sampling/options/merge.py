"""The options of a call: what was asked for, what is stored, and names that nobody knows."""

import difflib
import functools
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from hybrid import HybridForCausalLM
from hybrid.common.checks import is_whole, require
from hybrid.law import Law
from hybrid.sampling.options.checks import Options
from hybrid.sampling.reveal import owners

# What other libraries call it.
SYNONYMS = {
    "gen_length": "max_new_tokens", "max_tokens": "max_new_tokens", "max_gen_toks": "max_new_tokens",
    "block_length": "block_size", "threshold": "confidence_threshold", "steps": "steps_per_block",
    "diffusion_steps": "steps_per_block", "remasking": "reveal", "alg": "reveal", "seed": "generator",
    "denoising_steps": "steps_per_block", "small_block_size": "sub_block_size", "eps": "dream_eps",
    "mask_id": "HybridConfig.mask_token_id", "temp": "temperature", "eos_token": "eos_token_id",
}  # fmt: skip

OURS = (
    "mode", "block_size", "sub_block_size", "reveal", "fused", "drafts_per_round", "watchers", "auto_allow",
    "draft_adapter", "cache", "scheme", "blocks_in_flight", "block_add_threshold",
)  # fmt: skip
SHARED = (
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "eos_token_id",
    "pad_token_id", "bos_token_id", "num_return_sequences", "return_dict_in_generate", "use_cache",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens", "suppress_tokens",
    "sequence_bias", "logits_processor", "stopping_criteria", "stop_strings", "tokenizer", "max_time", "streamer",
    "output_scores",
)  # fmt: skip
# transformers' options at the values at which they do nothing.
NEUTRAL = {
    "num_beams": 1, "length_penalty": 1.0,
    "diversity_penalty": 0.0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
    "num_beam_groups": 1, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "typical_p": 1.0, "min_length": 0,
    "early_stopping": False, "remove_invalid_values": False, "token_healing": False, "is_assistant": False,
    "renormalize_logits": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "low_memory": False, "disable_compile": False, "assistant_early_exit": None,
}  # fmt: skip
# Arguments of transformers' `generate` that are no fields of its GenerationConfig.
THEIRS = (
    "inputs_embeds", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "negative_prompt_ids",
    "negative_prompt_attention_mask", "custom_generate",
)  # fmt: skip
# What a learned prompt of peft's puts in the place of the model's own method.
GUIDANCE = "guidance_scale"  # which models with clean_attention="full" have here
PREPARE = "prepare_inputs_for_generation"
BOOKKEEPING = ("transformers_version",)
FLAGS = ("do_sample", "fused", "output_scores", "return_dict_in_generate", "use_cache")
CACHES = ("cache_implementation", "cache_config", "max_cache_len")
# Those of transformers' options that say which text comes: where they are stored, mode="ar" follows them.
DECIDE = (
    "num_beams", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "begin_suppress_tokens", "guidance_scale", "watermarking_config", "min_length",
    "token_healing",
)  # fmt: skip
# What says how a text goes on and ends, which a gap does not.
LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "stop_strings", "stopping_criteria", "max_time")


def merge(model: HybridForCausalLM, kwargs: dict[str, Any], infill: bool = False) -> Options:
    """Arguments win over `generation_config=`, which wins over the model's `generation_config.json`. What is stored is
    a default and never counts as asked for: it gives way where it does not apply, which for a gap (`infill`) is all
    that says how a text goes on, and what nobody here knows means nothing.

    Raises:
        ValueError: a name that nobody knows, or that another library uses.
    """
    kwargs = dict(kwargs)
    given = kwargs.pop("generation_config", None)
    require(
        given is None or isinstance(given, GenerationConfig),
        f"generation_config is a {type(given).__name__}; pass a transformers GenerationConfig.",
    )
    own, known = _names()
    if not Law.of(model.config).cached and not infill:
        own |= {GUIDANCE}
    for name in kwargs:
        require(name not in SYNONYMS, f"{name} is another library's name; here it is {SYNONYMS.get(name)}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"generate has no argument {name!r}.{hint}")
    stored = _said(vars(model.generation_config))
    # A copy of what is stored, as pipelines hand in, asks for nothing either.
    config = {k: v for k, v in _said({} if given is None else vars(given)).items() if stored.get(k) != v}
    asked = {k: v for k, v in (config | _said(kwargs)).items() if k in known}
    for name in CACHES:
        require(name not in asked, f"{name}: this model keeps a cache of its own kind: leave it out.")
    but = {"use_cache", *((*LENGTHS, "mode") if infill else ())}
    stored = {k: v for k, v in stored.items() if k not in but}
    merged = {k: v for k, v in (stored | asked).items() if k in own}
    for name in FLAGS:
        require(isinstance(merged.get(name, False), bool), f"{name} is {merged.get(name)!r}; it is True or False.")
    for name in ("pad_token_id", "bos_token_id"):
        require(is_whole(merged.get(name, 0)), f"{name} is {merged.get(name)!r}; it must be a token id.")
    theirs = {k: v for k, v in asked.items() if k not in own and k not in BOOKKEEPING}
    if not infill and merged.get("mode", "ar") == "ar":
        theirs = {k: v for k, v in stored.items() if k in DECIDE} | theirs
    if (prompt := vars(model).get(PREPARE)) is not None:
        theirs[PREPARE] = prompt
    return Options(
        ours=merged,
        theirs={k: v for k, v in theirs.items() if k not in NEUTRAL or v != NEUTRAL[k]},
        explicit=frozenset(k for k, v in kwargs.items() if v is not None),
    )


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None and not k.startswith("_")}


@functools.cache
def _names() -> tuple[frozenset[str], frozenset[str]]:
    """The options that this library has, and all that `generate` takes."""
    own = frozenset({*OURS, *SHARED, *owners()})
    return own, own | set(vars(GenerationConfig())) | set(THEIRS)
