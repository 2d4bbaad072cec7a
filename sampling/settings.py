"""From the arguments of `generate` to a checked plan: one place for names, defaults and complaints."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.sampling.choice import Chooser, Draws, Warp
from hybrid.sampling.loop import Plan
from hybrid.sampling.reveal import Reveal, options, rules

MODES = ("ar", "block", "diffusion", "speculative")

# What other libraries call it.
SYNONYMS = {
    "gen_length": "max_new_tokens", "max_tokens": "max_new_tokens", "max_gen_toks": "max_new_tokens",
    "block_length": "block_size", "threshold": "confidence_threshold", "steps": "steps_per_block",
    "diffusion_steps": "steps_per_block", "remasking": "reveal", "alg": "reveal", "seed": "generator",
    "mask_id": "HybridConfig.mask_token_id", "temp": "temperature", "eos_token": "eos_token_id",
}  # fmt: skip

OURS = ("mode", "block_size", "reveal")
SHARED = (
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "eos_token_id",
    "pad_token_id", "bos_token_id", "num_return_sequences", "return_dict_in_generate", "use_cache",
)  # fmt: skip
# transformers' options at the values at which they do nothing.
NEUTRAL = {
    "num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
    "num_beam_groups": 1, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "typical_p": 1.0, "min_length": 0,
    "early_stopping": False, "remove_invalid_values": False, "token_healing": False, "is_assistant": False,
    "renormalize_logits": False, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "low_memory": False, "disable_compile": False, "assistant_early_exit": None,
}  # fmt: skip
# Arguments of transformers' `generate` that are no fields of its GenerationConfig.
THEIRS = (
    "inputs", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model",
    "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "tokenizer", "custom_generate",
)  # fmt: skip
BOOKKEEPING = ("transformers_version",)

DEFAULT_NEW_TOKENS = 128


def require(good: bool, message: str) -> None:
    """Raise a ValueError for the user unless `good`."""
    if not good:
        raise ValueError(message)


@dataclass(frozen=True)
class Options:
    """The options in force.

    Attributes:
        ours: those that this loop has.
        theirs: those that only transformers' own loops have.
        explicit: names given with the call: they must all make sense, where stored defaults may not apply.
    """

    ours: dict[str, Any]
    theirs: dict[str, Any]
    explicit: frozenset[str]

    def get(self, name: str, default: Any = None) -> Any:
        return self.ours.get(name, default)


def merge(model: HybridForCausalLM, kwargs: dict[str, Any]) -> Options:
    """Arguments win over `generation_config=`, which wins over the model's `generation_config.json`.

    Raises:
        ValueError: a name that nobody knows, or that another library uses.
    """
    kwargs = dict(kwargs)
    given = kwargs.pop("generation_config", None)
    require(
        given is None or isinstance(given, GenerationConfig),
        f"generation_config is a {type(given).__name__}; pass a transformers GenerationConfig.",
    )
    own = {*OURS, *SHARED, *(o for rule in rules() for o in options(rule))}
    known = own | set(vars(GenerationConfig())) | set(THEIRS)
    for name in kwargs:
        require(name not in SYNONYMS, f"{name} is another library's name; here it is {SYNONYMS.get(name)}.")
        close = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        require(name in known, f"generate has no argument {name!r}.{hint}")
    merged: dict[str, Any] = {}
    for source in (vars(model.generation_config), vars(given) if given is not None else {}, kwargs):
        merged |= {k: v for k, v in source.items() if v is not None and not k.startswith("_")}
    theirs = {k: v for k, v in merged.items() if k not in own and k not in BOOKKEEPING}
    return Options(
        ours={k: v for k, v in merged.items() if k in own},
        theirs={k: v for k, v in theirs.items() if k not in NEUTRAL or v != NEUTRAL[k]},
        explicit=frozenset(k for k, v in kwargs.items() if v is not None),
    )


def plan_of(config: HybridConfig, options: Options, rows: int, longest: int, generator: Any) -> Plan:
    """The checked plan of one call.

    Args:
        options: what `merge` found.
        rows: rows of the batch, `num_return_sequences` included.
        longest: tokens of the longest prompt.
        generator: None, one `torch.Generator`, or one per row.

    Raises:
        ValueError: an option is out of range or does not go with the mode or the model; the message names it.
    """
    mode = options.get("mode", "ar")
    require(mode in MODES, f"mode is {mode!r}; use one of {', '.join(map(repr, MODES))}.")
    if (problem := supports(config, mode)) is not None:
        raise ValueError(problem)
    blocks = mode in ("block", "speculative")
    require(
        blocks or "block_size" not in options.explicit,
        f"block_size is the window of mode='block' and mode='speculative', and mode is {mode!r}: leave it out.",
    )
    return Plan(
        mode=mode,
        max_new_tokens=_new_tokens(config, options, longest),
        block_size=_block_size(config, options, mode),
        reveal=_reveal(options, mode),
        foreign_reveal=callable(options.get("reveal")),
        steps=options.get("steps_per_block"),
        eos=_ids(options.get("eos_token_id", config.eos_token_id)),
        chooser=Chooser(Draws(_generators(generator, rows)), _warp(options)),
    )


def supports(config: HybridConfig, mode: str) -> str | None:
    """None if a model can decode in `mode`, else why it cannot and what to do."""
    if mode != "ar" and not config.is_hybrid:
        return (
            f"mode={mode!r} needs a mask token, and this is a pure autoregressive checkpoint (mask_token_id is None): "
            "convert it first, by loading it with mask_token_id=... and training with the joint objective. Only "
            "mode='ar' works now."
        )
    if mode in ("ar", "speculative") and config.clean_attention != "causal":
        return (
            f"mode={mode!r} needs clean_attention='causal', and this checkpoint has {config.clean_attention!r}: its "
            "clean text does not predict the next token left to right. Use mode='block' or mode='diffusion'."
        )
    return None


def _new_tokens(config: HybridConfig, options: Options, longest: int) -> int:
    room = config.max_position_embeddings - longest
    require(
        room > 0,
        f"the prompt has {longest} tokens, and the context ends at {config.max_position_embeddings} "
        "(max_position_embeddings): shorten the prompt.",
    )
    count = options.get("max_new_tokens")
    if count is None and (most := options.get("max_length")) is not None:
        count = most - longest
        require(count > 0, f"max_length is {most}, and the prompt alone has {longest} tokens.")
    if count is None:
        return min(DEFAULT_NEW_TOKENS, room)
    require(
        isinstance(count, int) and count > 0, f"max_new_tokens is {count!r}; it must be a whole number above 0."
    )
    require(
        count <= room,
        f"max_new_tokens is {count}, and behind a prompt of {longest} tokens the context of "
        f"{config.max_position_embeddings} has room for {room}.",
    )
    return int(count)


def _block_size(config: HybridConfig, options: Options, mode: str) -> int:
    size = options.get("block_size", config.block_size)
    require(isinstance(size, int) and size >= 1, f"block_size is {size!r}; it must be a whole number above 0.")
    require(
        size <= config.max_position_embeddings,
        f"block_size is {size}, larger than the context of {config.max_position_embeddings}.",
    )
    require(
        config.clean_attention != "block" or size == config.block_size,
        f"block_size is {size}, and this checkpoint's clean text attends on a grid of {config.block_size}: "
        "leave block_size out.",
    )
    require(
        mode != "speculative" or size >= 2,
        "mode='speculative' drafts block_size - 1 tokens: block_size must be at least 2.",
    )
    return int(size)


def _reveal(given: Options, mode: str) -> Reveal:
    """The reveal rule, from its name and its options, or the user's own function."""
    known = rules()
    owner = {option: rule for rule in known for option in options(rule)}
    asked = [option for option in owner if option in given.explicit]
    named = [option for option in (*asked, "reveal") if option in given.explicit]
    require(
        not named or mode in ("block", "diffusion"),
        f"{', '.join(named)}: this says how drafts are revealed, which mode={mode!r} does not do; use mode='block' or "
        "mode='diffusion', or leave it out.",
    )
    chosen = given.get("reveal")
    if chosen is None or (asked and "reveal" not in given.explicit):
        chosen = owner[asked[0]] if asked else next((owner[o] for o in owner if given.get(o) is not None), "threshold")
    for option in asked:
        require(
            owner[option] == chosen,
            f"{option} is an option of reveal={owner[option]!r}, and reveal is {chosen!r}: leave one out.",
        )
    if callable(chosen):
        return chosen
    require(chosen in known, f"reveal is {chosen!r}; use one of {', '.join(map(repr, known))}, or a function.")
    values = {option: given.get(option) for option, rule in owner.items() if rule == chosen}
    return known[chosen](**{option: value for option, value in values.items() if value is not None})


def _warp(options: Options) -> Warp | None:
    """transformers' own warpers, in its order; None for greedy decoding."""
    temperature, top_k, top_p, min_p = (options.get(k) for k in ("temperature", "top_k", "top_p", "min_p"))
    for name in ("temperature", "top_p", "min_p"):
        value = options.get(name)
        require(value is None or isinstance(value, int | float), f"{name} is {value!r}; it must be a number.")
    require(
        temperature is None or (math.isfinite(temperature) and temperature >= 0),
        f"temperature is {temperature}; it must be a finite number above 0 (or 0 for greedy decoding).",
    )
    require(top_k is None or (isinstance(top_k, int) and top_k >= 0), f"top_k is {top_k!r}; use a whole number >= 1.")
    require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}; it must lie in (0, 1].")
    require(min_p is None or 0 <= min_p <= 1, f"min_p is {min_p}; it must lie in [0, 1].")
    if not options.get("do_sample") or temperature == 0:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            idle = name in options.explicit and not (name == "temperature" and temperature in (0, 1))
            require(not idle, f"{name} only matters when sampling: add do_sample=True, or leave it out.")
        return None
    warpers = LogitsProcessorList()
    if temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p not in (None, 1.0):
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))

    def warp(logits: Tensor) -> Tensor:
        flat = logits.flatten(0, -2)
        return warpers(None, flat).view_as(logits)

    return warp


def _generators(generator: Any, rows: int) -> Sequence[torch.Generator]:
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        return [generator] * rows
    generators = list(generator)
    require(
        len(generators) == rows and all(isinstance(g, torch.Generator) for g in generators),
        f"generator: one torch.Generator, or a list with one for each of the {rows} rows; got {len(generators)}.",
    )
    return generators


def _ids(value: Any) -> tuple[int, ...]:
    """Token ids as a tuple: `value` is None, one id, or several."""
    if isinstance(value, Tensor):
        value = value.tolist()
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    require(
        all(isinstance(i, int) and not isinstance(i, bool) for i in ids),
        f"eos_token_id is {value!r}; it must be a token id or a list of token ids.",
    )
    return ids
