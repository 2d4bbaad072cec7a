"""What a caller hands in: the text, its padding, and the cache of an earlier call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid import HybridConfig, HybridForCausalLM, KVCache
from hybrid.common.checks import is_whole, require
from hybrid.law import Law
from hybrid.sampling.options.checks import Options


def ends_of(config: HybridConfig, options: Options) -> tuple[int, ...]:
    """The tokens that end a text.

    Raises:
        ValueError: what was given for them is no token ids.
    """
    value = options.get("eos_token_id", config.eos_token_id)
    if isinstance(value, Tensor):
        value = value.tolist()
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    require(all(map(is_whole, ids)), f"eos_token_id is {value!r}; it must be a token id or a list of token ids.")
    return ids


def problem_of(config: HybridConfig, text: Sequence[int], gaps: bool) -> tuple[int | None, str] | None:
    """What is wrong with a text to be continued, or to be filled (`gaps`): words that go on from a name of its token of
    this index, or of the text itself (None)."""
    mask, most = config.mask_token_id, config.max_position_embeddings
    if not text:
        return None, "is empty; begin with at least one token (bos)."
    if (bad := next((i for i, token in enumerate(text) if not 0 <= token < config.vocab_size), None)) is not None:
        return bad, (
            f"is {text[bad]}, outside the vocabulary (0 to {config.vocab_size - 1}): was the text tokenised with this "
            "checkpoint's tokenizer?"
        )
    if not gaps and config.is_hybrid and mask in text:
        return text.index(mask), (
            f"is the mask token ({mask}): text is continued to the right; leave the mask token out, or fill gaps with "
            "model.infill, or mode='infill' of a request."
        )
    if gaps and mask not in text:
        return None, f"has no mask token ({mask}), so there is nothing to fill."
    if gaps and len(text) > most:
        return None, f"has {len(text)} tokens, more than the context of {most}."
    return None


def prompt_of(ids: Any, attention_mask: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """The text of a call and its padding mask, however they came: in `inputs`, in a tokenizer's output, as lists or
    arrays; what stands for them in `options` is taken out."""
    inputs = options.pop("inputs", None)
    require(ids is None or inputs is None, "inputs and input_ids say the same: give one of them.")
    ids = inputs if ids is None else ids
    if isinstance(ids, Mapping):  # as a tokenizer gives them
        require(attention_mask is None, "input_ids is a tokenizer's output, which has its own attention_mask.")
        require(set(ids) <= {"input_ids", "attention_mask", "token_type_ids"}, f"input_ids has {', '.join(ids)}.")
        options["token_type_ids"] = ids.get("token_type_ids")
        ids, attention_mask = ids.get("input_ids"), ids.get("attention_mask")
    options.pop("labels", None)  # what transformers' Trainer has in a batch, which their loop drops too
    types = options.pop("token_type_ids", None)
    require(
        types is None or not _tensor("token_type_ids", types).any(),
        "token_type_ids tell a second text from the first, and this model has no such thing: leave them out.",
    )
    return _tensor("input_ids", ids), _tensor("attention_mask", attention_mask)


def _tensor(name: str, given: Any) -> Any:
    if given is None or isinstance(given, Tensor):
        return given
    try:
        return torch.as_tensor(given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is a {type(given).__name__} that is no rectangle of whole numbers ({error}): rows of unequal "
            "length are padded, with an attention_mask beside them (tokenizer(texts, padding=True, "
            "return_tensors='pt'))."
        ) from error


def checked_prompt(
    model: HybridForCausalLM, ids: Tensor | None, attention_mask: Tensor | None, options: Options, gaps: bool = False
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The checked ids, which of them are real, bool `[B, T]`, and the text of each row; with `gaps`, mask tokens belong
    in it. Without an attention_mask, padding is what transformers takes for it: every pad token, where that ends no
    text as well."""
    config = model.config
    require(isinstance(ids, Tensor), "input_ids is missing: pass int64 token ids [batch, length].")
    assert isinstance(ids, Tensor)
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    require(
        ids.ndim == 2 and whole,
        f"input_ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; it must be whole numbers [batch, length].",
    )
    ids = ids.to(model.device, torch.int64)
    if attention_mask is None:
        pad, ends = options.get("pad_token_id", config.pad_token_id), ends_of(config, options)
        none = pad is None or pad in ends or (gaps and pad == config.mask_token_id)
        real = torch.ones_like(ids, dtype=torch.bool) if none else ids.ne(pad)
    else:
        require(
            attention_mask.shape == ids.shape,
            f"attention_mask has shape {tuple(attention_mask.shape)}, and input_ids {tuple(ids.shape)}.",
        )
        real = attention_mask.to(ids.device).bool()
    texts = [own[is_real].tolist() for own, is_real in zip(ids, real, strict=True)]
    for row, text in enumerate(texts or [[]]):
        if (problem := problem_of(config, text, gaps)) is not None:
            index, words = problem
            where = f": row {row}" if index is None else f"[{row}, {int(real[row].nonzero()[index])}]"
            raise ValueError(f"input_ids{where} {words}")
    return ids, real, texts


def check_cache(model: HybridForCausalLM, cache: Any, texts: list[list[int]], law: Law) -> None:
    """A cache from an earlier call must hold a beginning of this text, seen as `law` has it."""
    require(
        isinstance(cache, KVCache),
        f"past_key_values is a {type(cache).__name__}; pass the KVCache that generate returned.",
    )
    layers, _, heads, _, size = cache.keys.shape
    config = model.config
    require(law.cached, "past_key_values: a clean_attention='full' model has no exact cache.")
    require(
        (layers, heads, size) == (config.num_hidden_layers, config.num_key_value_heads, config.head_dim),
        "past_key_values comes from a model of another shape: pass the cache that this model returned.",
    )
    require(
        len(cache.lengths) == len(texts),
        f"past_key_values holds {len(cache.lengths)} rows, and the batch has {len(texts)}: use cache.select(rows).",
    )
    for row, (have, text) in enumerate(zip(cache.lengths, texts, strict=True)):
        require(
            have <= len(text),
            f"past_key_values holds {have} tokens of row {row}, and the text has only {len(text)}: pass the whole "
            "text, what was generated included.",
        )
        pairs = enumerate(zip(cache.ids[row, :have].tolist(), text, strict=False))
        differs = next((i for i, (kept, given) in pairs if kept != given), None)
        require(
            differs is None,
            f"past_key_values does not belong to this text: row {row} differs at position {differs}. Pass the text it "
            "was made from, or no cache.",
        )
        block = law.clean(torch.arange(have)[None]).block[0]
        require(
            torch.equal(cache.labels[1, row, :have].cpu(), block),
            "past_key_values was made by a mode in which text sees itself otherwise (in whole blocks, or from left to "
            "right): go on in such a mode, or pass no cache.",
        )
