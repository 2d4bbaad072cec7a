"""transformers' own left-to-right loops, beam search and the like, over a model: what they get and what they lack."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridForCausalLM, KVCache
from hybrid.common.checks import require
from hybrid.law import Law
from hybrid.sampling.options.checks import Options
from hybrid.sampling.options.merge import CACHES, OURS

ASSISTED = frozenset({"assistant_model", "prompt_lookup_num_tokens"})  # drafts of somebody else's


def in_their_loop(
    model: HybridForCausalLM, input_ids: Tensor | None, real: Tensor | None, options: Options, kwargs: dict[str, Any],
    cache: KVCache | None, generator: Any,
) -> Any:  # fmt: skip
    """What transformers' own `generate` makes of a call.

    Raises:
        ValueError: something is asked for that it does not have.
    """
    mode, names = options.get("mode", "ar"), ", ".join(sorted(options.theirs))
    assisted = not ASSISTED.isdisjoint(options.theirs)
    require(mode == "ar", f"{names}: only mode='ar' has this, and mode is {mode!r}.")
    require(
        generator is None or (isinstance(generator, torch.Generator) and options.get("do_sample", False)),
        f"{names}: this runs in transformers' own loop, which takes one generator where it samples, and else none.",
    )
    for name in OURS:
        require(name == "mode" or kwargs.get(name) is None, f"{names}: transformers' own loop has no {name}.")
    require(
        Law.of(model.config).exact,
        f"{names}: transformers' own loop needs clean_attention='causal'; this is {model.config.clean_attention!r}.",
    )
    passed = _passed(model, options, kwargs, names)
    require(
        cache is None or not assisted,
        f"past_key_values: transformers' assisted loop ({names}) begins with an empty cache: leave one out.",
    )
    if cache is None and assisted:  # which must be there before the first forward
        cache = KVCache(model.config, 1, 0 if input_ids is None else input_ids.shape[1], model.device, model.dtype)
    if input_ids is None or real is None:
        with _own_randomness(generator):
            return model._transformers_generate(attention_mask=real, past_key_values=cache, **passed)
    # Their loop takes padding on the left only.
    order = real.long().argsort(dim=1, stable=True)
    left, mask = input_ids.where(real, 0).gather(1, order), real.gather(1, order).long()
    with _own_randomness(generator):  # the ids by name, as peft's learned prompts want them
        out = model._transformers_generate(input_ids=left, attention_mask=mask, past_key_values=cache, **passed)
    found = out if isinstance(out, Tensor) else out.sequences
    found[:, : input_ids.shape[1]] = input_ids.repeat_interleave(len(found) // len(input_ids), 0)
    return out


def _passed(model: HybridForCausalLM, options: Options, kwargs: dict[str, Any], names: str) -> dict[str, Any]:
    """The arguments of theirs: what their configuration has a field for stands in one of the call's own."""
    passed = {k: v for k, v in kwargs.items() if k != "mode"}
    if isinstance(passed.get("streamer"), list | tuple):
        require(len(passed["streamer"]) == 1, f"{names}: transformers' own loop has one streamer, for one text.")
        (passed["streamer"],) = passed["streamer"]
    config = copy.deepcopy(passed.pop("generation_config", None) or model.generation_config)
    if model.config.is_hybrid:
        passed["suppress_tokens"] = [*(options.get("suppress_tokens") or []), model.config.mask_token_id]
    # Caches that are stored belong to other models.
    fields = {**dict.fromkeys(CACHES), "use_cache": True, **{k: v for k, v in passed.items() if hasattr(config, k)}}
    for name, value in fields.items():
        setattr(config, name, value)
    return {k: v for k, v in passed.items() if k not in fields} | {"generation_config": config}


@contextlib.contextmanager
def _own_randomness(generator: torch.Generator | None) -> Iterator[None]:
    """transformers' loops draw from PyTorch's global generators: those get a seed of the call's own, and afterwards
    what they had."""
    source = torch.Generator() if generator is None else generator
    drawn = torch.randint(2**63 - 1, (), generator=source, device=source.device)
    seed = source.seed() if generator is None else int(drawn)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
