"""What transformers' callers hand to a forward: checked, and brought to ids and a layout.

Shapes: B rows, T tokens, C hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.cache import KVCache
from hybrid.common.checks import require
from hybrid.law import Law
from hybrid.layout import Layout

# How a row's texts lie in it, as collators without padding say it to attention kernels.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def checked_ids(
    input_ids: Any, inputs_embeds: Any, attention_mask: Any, position_ids: Any, cache: Any, layout: Any,
    use_cache: bool | None, further: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """The ids `[B, T]` of a forward, all of whose arguments are what they must be; `further` are those of other names.

    Raises:
        ValueError: an argument that does not go with another, or that no forward takes.
    """
    require(
        cache is None or isinstance(cache, KVCache),
        f"past_key_values is a {type(cache).__name__}; this model keeps its own `KVCache`: pass one that it returned, "
        "or None.",
    )
    _refuse_unknown(further, position_ids)
    tensors = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids,
               "attention_mask": attention_mask}  # fmt: skip
    for name, given in tensors.items():
        if given is not None:
            require(isinstance(given, Tensor), f"{name} is a {type(given).__name__}; pass a tensor.")
            whole = not given.is_floating_point() and given.dtype != torch.bool
            require(whole or not name.endswith("_ids"), f"{name} has dtype {given.dtype}; it must be whole numbers.")
    require(layout is None or isinstance(layout, Layout), f"layout is a {type(layout).__name__}; pass a Layout.")
    require(
        (input_ids is None) != (inputs_embeds is None), "input_ids and inputs_embeds say the same: give one of them."
    )
    if input_ids is None:  # no id stands for them, so no text can go on behind them in another call
        input_ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
    require(input_ids.ndim == 2, f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, length].")
    require(
        layout is None or (attention_mask is None and position_ids is None and not use_cache),
        "layout says all: leave attention_mask, position_ids and use_cache out.",
    )
    ids: Tensor = input_ids
    return ids


class Clean(NamedTuple):
    """Clean text, packed to the left, so that padding never enters a cache.

    Attributes:
        layout: of the packed tokens.
        order: int64 `[B, T]`, the place that each of them had; None where there is no padding.
        counts: how many tokens each row has.
    """

    layout: Layout
    order: Tensor | None
    counts: list[int]

    @classmethod
    def of(
        cls, law: Law, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: KVCache | None
    ) -> "Clean":
        """What ids `[B, T]` and the arguments beside them say.

        Raises:
            ValueError: they do not go with each other, or with what the cache holds.
        """
        (batch, tokens), device = ids.shape, ids.device
        past = [0] * batch if cache is None else cache.lengths[cache.first : cache.first + cache.active]
        if cache is not None:
            _check_cache(law, past, batch)
        real = None if attention_mask is None else _real(attention_mask, batch, tokens)
        if position_ids is not None:
            good = position_ids.ndim == 2 and position_ids.shape[1] == tokens and len(position_ids) in (1, batch)
            require(good, f"position_ids has shape {tuple(position_ids.shape)}; it must be {(batch, tokens)}.")
            position_ids = position_ids.to(device).expand(batch, -1)
        index, order = torch.arange(tokens, device=device), None
        inside = None  # [B, T], of the packed rows
        if real is not None and not real.all():
            order, inside = (~real).long().argsort(dim=1, stable=True), index < real.sum(1, keepdim=True)
            position_ids = None if position_ids is None else position_ids.gather(1, order)
        begins = None
        if position_ids is not None and not any(past):
            # As transformers finds texts that were packed into a row. Where there is padding, positions may be skipped.
            step = position_ids.diff(dim=1)
            begins = F.pad(step != 1 if real is None else step <= 0, (1, 0))
            begins = begins if inside is None else begins & inside
        if begins is None or not begins.any():
            layout = law.clean(torch.tensor(past, device=device)[:, None] + index)
        else:
            require(
                cache is None, "position_ids restart: several texts in a row, of which a cache holds one; use none."
            )
            position = index - (begins * index).cummax(1).values
            layout = Layout.of(position, law.clean(position).block, doc=begins.cumsum(1))
        if position_ids is not None:
            layout = Layout.of(position_ids, layout.block, doc=layout.doc, pattern=layout.pattern)
        if inside is None:
            return cls(layout, None, [tokens] * batch)
        return cls(layout.where(inside, layout.doc), order, inside.sum(1).tolist())

    def packed(self, x: Tensor) -> Tensor:
        """Ids `[B, T]` or embeddings `[B, T, C]` in the order of the layout."""
        return x if self.order is None else x.gather(1, _like(self.order, x))

    def unpacked(self, x: Tensor) -> Tensor:
        """States `[B, T, C]` in the order in which the tokens were given."""
        return x if self.order is None else x.gather(1, _like(self.order.argsort(dim=1), x))


def _like(index: Tensor, x: Tensor) -> Tensor:
    return index.view(*index.shape, *[1] * (x.ndim - 2)).expand_as(x)


def _real(attention_mask: Tensor, batch: int, tokens: int) -> Tensor:
    """bool `[B, T]`: which tokens of the input are none of the padding."""
    require(
        attention_mask.ndim == 2 and len(attention_mask) == batch and attention_mask.shape[1] >= tokens,
        f"attention_mask has shape {tuple(attention_mask.shape)}; it must be [batch, length] of the input, "
        f"{(batch, tokens)}, or of the cached text and the input: what a token sees beyond that is said by layout.",
    )
    return attention_mask[:, -tokens:].bool()


def _refuse_unknown(given: Mapping[str, Any], position_ids: Tensor | None) -> None:
    """What transformers' own code passes to every forward is let pass where it is true here anyway."""
    known = {"cache_position", *(PACKED if position_ids is not None else ())}  # which say it as well
    types = given.get("token_type_ids")  # of tokenizers that know of pairs of texts
    if isinstance(types, Tensor) and not types.any():
        known.add("token_type_ids")
    unknown = sorted(k for k, v in given.items() if k not in known and v is not None and v is not False)
    require(not unknown, f"forward does not take {', '.join(unknown)}.")


def _check_cache(law: Law, past: Sequence[int], rows: int) -> None:
    """Raise ValueError where clean text cannot go on behind what a cache holds."""
    require(
        law.cached, "use_cache: a clean_attention='full' model has no exact cache; leave past_key_values out too."
    )
    require(len(past) == rows, f"past_key_values holds {len(past)} rows, and input_ids {rows}.")
    require(
        not any(length % law.unit for length in past),
        f"past_key_values ends inside a block of {law.unit}, whose tokens see one another, and cannot go on: give the "
        "model whole blocks, or the text without a cache.",
    )
