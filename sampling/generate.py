"""`generate`: continue text in one of four modes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hybrid import HybridForCausalLM, KVCache
from hybrid.sampling.loop import Loop
from hybrid.sampling.settings import merge, plan_of, require, supports
from hybrid.sampling.stats import GenerationStats


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: int64 `[B, T + new]`: the input as given and the new tokens, right-padded.
        stats: the ledger of forwards.
        past_key_values: hand it to the next `generate`, in any mode, with the whole text. None for models with
            `clean_attention="full"`, which have no exact cache.
    """

    sequences: Tensor | None = None
    stats: GenerationStats | None = None
    past_key_values: KVCache | None = None


@torch.no_grad()
def generate(
    model: HybridForCausalLM,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    past_key_values: KVCache | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    **kwargs: Any,
) -> Tensor | GenerateOutput:
    """Continue `input_ids`, int64 `[B, T]`.

    Args:
        attention_mask: 0 for padding, anywhere in a row.
        mode: "ar" one token a forward; "block" drafts `block_size` tokens at once, then settles them;
            "diffusion" drafts all that is left at once; "speculative" drafts a block once and keeps what the
            left-to-right model confirms: the same tokens as "ar", in fewer forwards.
        max_new_tokens: tokens a row at most (default 128, or what the context has room for).
        block_size: the window of "block" and "speculative" (default: the checkpoint's).
        reveal: which drafts are shown after each forward in "block" and "diffusion": "threshold" (with
            `confidence_threshold`, default 0.9), "steps" (with `steps_per_block`), or a function.
        do_sample, temperature, top_k, top_p, min_p, eos_token_id, pad_token_id, num_return_sequences,
            return_dict_in_generate, generation_config: as in transformers; temperature 0 is greedy.
        generator: source of all randomness when sampling: one, or one per row; by default freshly seeded.
            PyTorch's global random state is neither read nor changed.
        past_key_values: the cache of an earlier `generate` in any mode; `input_ids` is then the whole text.

    Returns:
        `sequences`, or a `GenerateOutput` with `return_dict_in_generate=True`. Options that only transformers'
        own loops have (beam search and the like) send mode="ar" there.

    Raises:
        ValueError: an argument is out of range or does not go with another; the message names it.
    """
    options = merge(model, kwargs)
    input_ids, real = _prompt(model, input_ids, attention_mask)
    if options.theirs:
        mode, names = options.get("mode", "ar"), ", ".join(sorted(options.theirs))
        require(mode == "ar", f"{names}: only mode='ar' has this, and mode is {mode!r}.")
        require(generator is None, f"{names}: this runs in transformers' own loop, which takes no generator.")
        require((problem := supports(model.config, mode)) is None, problem or "")
        # Their loop takes padding on the left only.
        order = real.long().argsort(dim=1, stable=True)
        left, mask = input_ids.where(real, 0).gather(1, order), real.gather(1, order).long()
        passed = {k: v for k, v in kwargs.items() if k != "mode"}
        if model.config.is_hybrid:
            suppressed = options.theirs.get("suppress_tokens") or []
            passed["suppress_tokens"] = [*suppressed, model.config.mask_token_id]
        out = model._transformers_generate(left, attention_mask=mask, past_key_values=past_key_values, **passed)
        found = out if isinstance(out, Tensor) else out.sequences
        found[:, : input_ids.shape[1]] = input_ids.repeat_interleave(len(found) // len(input_ids), 0)
        return out

    repeats = options.get("num_return_sequences", 1)
    require(isinstance(repeats, int) and repeats >= 1, f"num_return_sequences is {repeats!r}; use 1 or more.")
    input_ids, real = input_ids.repeat_interleave(repeats, 0), real.repeat_interleave(repeats, 0)
    lengths = real.sum(1).tolist()
    plan = plan_of(model.config, options, len(lengths), max(lengths), generator)
    packed = input_ids.gather(1, (~real).long().argsort(dim=1, stable=True))
    cache = past_key_values
    if cache is None:
        cache = KVCache(model.config, len(lengths), max(lengths) + 1, model.device, model.dtype)
        if model.config.clean_attention != "full":
            cache.reserve(max(lengths) + plan.max_new_tokens + plan.block_size)
    else:
        _check_cache(model, cache, packed, lengths)
    loop = Loop(model, plan, packed, lengths, cache)
    with model.model.flat(loop.room), torch.inference_mode():
        texts = loop.run()

    pads = (options.get("pad_token_id"), model.config.pad_token_id, *plan.eos, 0)
    pad = next(int(p) for p in pads if p is not None)
    new = [text[length:] for text, length in zip(texts, lengths, strict=True)]
    tail = torch.nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=pad)
    sequences = torch.cat([input_ids, tail], 1)
    if not options.get("return_dict_in_generate"):
        return sequences
    exact = model.config.clean_attention != "full" and options.get("use_cache", True)
    return GenerateOutput(sequences=sequences, stats=loop.stats, past_key_values=cache if exact else None)


def _prompt(model: HybridForCausalLM, ids: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The checked prompt and which of its slots are real, bool `[B, T]`."""
    config = model.config
    require(isinstance(ids, Tensor), "input_ids is missing: pass int64 token ids [batch, length].")
    assert isinstance(ids, Tensor)
    require(
        ids.ndim == 2 and not ids.is_floating_point(),
        f"input_ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; it must be whole numbers [batch, length].",
    )
    ids = ids.to(model.device, torch.int64)
    if attention_mask is None:
        real = torch.ones_like(ids, dtype=torch.bool)
    else:
        require(
            attention_mask.shape == ids.shape,
            f"attention_mask has shape {tuple(attention_mask.shape)}, and input_ids {tuple(ids.shape)}.",
        )
        real = attention_mask.to(ids.device).bool()
    empty = (~real.any(1)).nonzero().flatten().tolist() if ids.numel() else list(range(max(1, len(ids))))
    require(not empty, f"input_ids: the prompt of row {empty[:1]} is empty; begin with at least one token (bos).")
    bad = real & ((ids < 0) | (ids >= config.vocab_size))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{row}, {column}] is {int(ids[row, column])}, outside the vocabulary "
            f"(0 to {config.vocab_size - 1}): was the text tokenised with this checkpoint's tokenizer?"
        )
    if config.is_hybrid and (masked := real & (ids == config.mask_token_id)).any():
        row, column = masked.nonzero()[0].tolist()
        raise ValueError(
            f"input_ids[{row}, {column}] is the mask token ({config.mask_token_id}): generate continues text to "
            "the right and fills no gaps; leave the mask token out of the prompt."
        )
    return ids, real


def _check_cache(model: HybridForCausalLM, cache: Any, packed: Tensor, lengths: list[int]) -> None:
    """A cache from an earlier call must hold a beginning of this text."""
    require(
        isinstance(cache, KVCache),
        f"past_key_values is a {type(cache).__name__}; pass the KVCache that generate returned.",
    )
    layers, _, heads, _, size = cache.keys.shape
    config = model.config
    require(config.clean_attention != "full", "past_key_values: a clean_attention='full' model has no exact cache.")
    require(
        (layers, heads, size) == (config.num_hidden_layers, config.num_key_value_heads, config.head_dim),
        "past_key_values comes from a model of another shape: pass the cache that this model returned.",
    )
    require(
        len(cache.lengths) == len(lengths),
        f"past_key_values holds {len(cache.lengths)} rows, and the batch has {len(lengths)}: use cache.select(rows).",
    )
    for row, (have, length) in enumerate(zip(cache.lengths, lengths, strict=True)):
        require(
            have <= length,
            f"past_key_values holds {have} tokens of row {row}, and the text has only {length}: pass the whole text, "
            "what was generated included.",
        )
        differs = (cache.ids[row, :have] != packed[row, :have]).nonzero()
        require(
            not len(differs),
            f"past_key_values does not belong to this text: row {row} differs at position "
            f"{int(differs[0]) if len(differs) else 0}. Pass the text it was made from, or no cache.",
        )
