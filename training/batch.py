"""What a batch is, and how one is made of what people have: bare token ids, and what Hugging Face's collators add.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from hybrid import HybridConfig

NOT_LEARNED = -100  # in `labels`, as everywhere in PyTorch and transformers


class Batch(TypedDict):
    """input_ids int64, target bool (tokens to be learned) and doc int64 (-1: padding), all `[B, T]`; index int64
    `[B]`, the number of each sample in the stream."""

    input_ids: Tensor
    target: Tensor
    doc: Tensor
    index: Tensor


def as_batch(given: Any, first: int = 0, stride: int = 1) -> Batch:
    """`given` with all that a batch has.

    Args:
        given: token ids `[B, T]`, or a mapping that has them as `input_ids`. Beside them there may be `attention_mask`
            (0: padding), `labels` (-100: not to be learned; everywhere else the ids themselves, not shifted),
            `position_ids` (of packed rows: they begin anew with each document), or `target`, `doc` and `index` as they
            are in a `Batch`. What is left out: every token is learned, and each row is one document.
        first, stride: the rows get the numbers first, first + stride, … where they have no `index`. They decide the
            noise: rows that are seen again should get others.

    Raises:
        TypeError: there are no token ids, or a tensor has another type than it should.
        ValueError: shapes that do not go together, or labels that are not the ids.
    """
    found: Mapping[str, Any] = given if isinstance(given, Mapping) else {"input_ids": given}
    ids = found.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(
            f"a batch is token ids or a dictionary with them as input_ids (a tensor of integers); this one is "
            f"{_what(given)}."
        )
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(f"input_ids has shape {list(ids.shape)}; it needs rows of at least 2 tokens, [B, T].")
    for name in ("attention_mask", "labels", "target", "doc"):
        if found.get(name) is not None and found[name].shape != ids.shape:
            raise ValueError(f"{name} has shape {list(found[name].shape)}, and input_ids {list(ids.shape)}.")
    doc = _documents(found, ids)
    index = found.get("index")
    if index is None:
        index = torch.arange(first, first + stride * len(ids), stride, device=ids.device)
    return Batch(input_ids=ids.long(), target=_targets(found, ids) & (doc >= 0), doc=doc, index=index)


def each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor changed alike: rows chosen, or taken to a device."""
    return Batch(**{name: change(value) for name, value in batch.items()})  # type: ignore


def check_context(length: int, config: HybridConfig) -> None:
    """Raise ValueError for rows of `length` tokens that are too long for a model with this config."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"the data has rows of {length} tokens, and max_position_embeddings is {config.max_position_embeddings}: "
            "make rows shorter or the context longer."
        )


def check_batch(batch: Batch, config: HybridConfig) -> None:
    """Raise ValueError for rows that a model with this config cannot take."""
    ids = batch["input_ids"]
    check_context(ids.shape[1], config)
    real = batch["doc"] >= 0
    strange = real & ((ids < 0) | (ids >= config.vocab_size))
    masks = torch.zeros_like(real) if config.mask_token_id is None else real & (ids == config.mask_token_id)
    if not bool((strange | masks).any()):  # one look at the device in the common case
        return
    if bool(strange.any()):
        raise ValueError(f"input_ids has {int(ids[strange][0])}, and the model's vocabulary has {config.vocab_size}.")
    raise ValueError(
        f"input_ids has the mask token ({config.mask_token_id}) {int(masks.sum())} times: it stands for what is not "
        "known, and text never has it. If it is padding, say so with attention_mask or doc=-1."
    )


def _targets(found: Mapping[str, Any], ids: Tensor) -> Tensor:
    target, labels = found.get("target"), found.get("labels")
    if target is not None:
        if target.dtype != torch.bool:
            raise TypeError(f"target is {target.dtype}; it is bool, True for tokens to be learned.")
        return target
    if labels is None:
        return torch.ones_like(ids, dtype=torch.bool)
    learned = labels != NOT_LEARNED
    if bool((learned & (labels != ids)).any()):
        raise ValueError(
            "labels are to be the same as input_ids, not shifted, or -100: this objective makes its noise itself, and "
            "every token is its own answer."
        )
    return learned


def _documents(found: Mapping[str, Any], ids: Tensor) -> Tensor:
    doc, position, real = found.get("doc"), found.get("position_ids"), found.get("attention_mask")
    if doc is not None:
        doc = doc.long()
    elif position is not None:
        position = position.expand_as(ids)
        doc = torch.zeros_like(ids, dtype=torch.int64)
        doc[:, 1:] = (position[:, 1:] != position[:, :-1] + 1).cumsum(1)
    else:
        doc = torch.zeros_like(ids, dtype=torch.int64)
    return doc if real is None else torch.where(real.bool(), doc, -1)


def _what(given: Any) -> str:
    if isinstance(given, Mapping):
        return f"a dictionary with {', '.join(map(str, given)) or 'nothing'}"
    return f"a tensor of {given.dtype}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
