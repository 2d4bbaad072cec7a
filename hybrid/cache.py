"""`KVCache`: writes are provisional until `commit`, so rolling back is doing nothing.

The cache holds the keys and values of committed tokens, with their labels and ids beside them, and a length
per row. A forward writes its tokens behind each row's length and may look at them at once; the next forward
overwrites whatever was not committed. Rows of a batch may commit different numbers of tokens.

Shapes: B rows, H key heads, S slots, T tokens of one forward, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid.config import HybridConfig
from hybrid.layout import Layout

# What a kernel call of its own costs a row, in numbers of a key that could have been read meanwhile (CPU, measured).
CALL = 15_000


class KVCache:
    """Keys and values `[layer, B, H, S, D]` of the text so far.

    Args:
        config: of the model whose keys they are.
        batch_size: rows.
        slots: tokens that a row has room for; `reserve` makes more.
        device, dtype: of keys and values; the model's own.

    Attributes:
        lengths: committed tokens of each row.
        first, active: the rows that take part in forwards, `active` of them from the `first` on; the others rest.
        ids: int64 `[B, S]`, the token of each slot; only the first `lengths[b]` of a row mean anything.
        ends: where the keys of each row of the last forward end, if its rows are so unequal that each is better looked
            at alone; else None.
    """

    ends: list[int] | None = None

    # What is made in inference mode cannot be written to outside, and a cache is handed on: hence the decorators.
    @torch.inference_mode(False)
    def __init__(
        self, config: HybridConfig, batch_size: int, slots: int,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, slots, config.head_dim)
        # Zeros, not empty: a masked slot has weight 0, and 0 x NaN would still be NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch_size, slots, dtype=torch.int64, device=device)
        self.labels = torch.full((4, batch_size, slots), -1, dtype=torch.int64, device=device)
        self.lengths = [0] * batch_size
        self.first, self.active = 0, batch_size
        self._end = 0
        self._most: int | None = None
        self._keys: tuple[Tensor, ...] = self.keys.unbind()
        self._values: tuple[Tensor, ...] = self.values.unbind()
        self._slots: Tensor | None = None
        self._written = 0

    @property
    def even(self) -> bool:
        """Whether all active rows have the same length, so that writes and reads are plain slices."""
        return len(set(self.lengths[self._rows])) <= 1

    @property
    def _rows(self) -> slice:
        return slice(self.first, self.first + self.active)

    def focus(self, first: int, active: int, end: int | None = None) -> None:
        """Let only `active` rows, from the `first` on, take part in the forwards that follow.

        Args:
            end: where the longest of them ends in these forwards, provisional tokens included. What a forward has for
                a row beyond that is padding, and has one slot together. None: rows are as wide as the forward is.
        """
        assert first >= 0 and first + active <= len(self.lengths)
        self.first, self.active, self._most = first, active, end

    def open(self, layout: Layout, ids: Tensor) -> Layout:
        """Take T provisional slots behind every active row's length, and label them.

        Args:
            layout: labels of the tokens about to be written, `[active or 1, T]`.
            ids: their ids, int64 `[active, T]`.

        Returns:
            The labels of all slots that this forward may look at, `[active, end]`: the written ones included.
        """
        count, rows = ids.shape[1], self._rows
        assert len(ids) == self.active, f"{len(ids)} rows of ids for {self.active} active rows"
        lengths = self.lengths[rows]
        self._end, self._written = max(lengths) + count, count
        if self._most is not None:
            self._end = min(self._end, self._most + 1)
        self.reserve(self._end)
        if self.even:
            self._slots = None
            self.labels[:, rows, lengths[0] : self._end] = layout.labels
            self.ids[rows, lengths[0] : self._end] = ids
        else:
            start = torch.tensor(lengths, device=ids.device)[:, None]
            self._slots = (start + torch.arange(count, device=ids.device)).clamp(max=self._end - 1)
            # A shorter row's slots beyond this forward hold what was rolled back: nobody may see it.
            beyond = torch.arange(self._end, device=ids.device) >= start
            self.labels[3, rows, : self._end].masked_fill_(beyond, -1)
            index = self._slots.expand(4, -1, -1)
            self.labels[:, rows].scatter_(2, index, layout.labels.expand(-1, len(ids), -1))
            self.ids[rows].scatter_(1, self._slots, ids)
        ends = [length + count for length in lengths]
        waste = (len(ends) * self._end - sum(ends)) * self.keys.shape[2] * self.keys.shape[4]
        self.ends = ends if ids.device.type == "cpu" and waste > len(ends) * CALL else None
        # Sliced once for all layers.
        self._keys, self._values = (x[:, rows, :, : self._end].unbind() for x in (self.keys, self.values))
        return Layout(self.labels[:, rows, : self._end])

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values; what is new in the result has its gradient, and what is kept has none.

        Args:
            key, value: `[active, H, T, D]`, in any float dtype; they are kept in the cache's.

        Returns:
            All keys and values that the forward may look at, `[active, H, end, D]`.
        """
        both = ((self._keys[layer], key), (self._values[layer], value))
        for seen, new in both:
            kept = new.detach()
            if self._slots is None:
                seen[:, :, -new.shape[2] :].copy_(kept)
            else:
                seen.scatter_(2, self._slots[:, None, :, None].expand_as(kept), kept)
        if key.requires_grad or value.requires_grad:
            return self._with_gradient(*both[0]), self._with_gradient(*both[1])
        return self._keys[layer], self._values[layer]

    def _with_gradient(self, seen: Tensor, new: Tensor) -> Tensor:
        new = new.to(seen.dtype)
        if self._slots is None:
            return torch.cat([seen[:, :, : -new.shape[2]], new], 2)
        return seen.scatter(2, self._slots[:, None, :, None].expand_as(new), new)

    def commit(self, n: int | Sequence[int]) -> None:
        """Keep the first `n` tokens of the last forward, one number for all active rows or one each."""
        counts = [n] * self.active if isinstance(n, int) else list(n)
        assert len(counts) == self.active and all(0 <= c <= self._written for c in counts), (
            f"commit({counts}) after a forward of {self._written} tokens over {self.active} rows"
        )
        for row, count in enumerate(counts, self.first):
            self.lengths[row] += count
        self._written = 0

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget committed tokens beyond `lengths`, per row; later ones are written over."""
        assert all(0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens a row; growth is at least by half, so that asking often is cheap."""
        have = self.ids.shape[1]
        if slots > have:
            self.resize(len(self.lengths), max(slots, have + have // 2))

    @torch.inference_mode(False)
    def resize(self, rows: int, slots: int) -> None:
        """Have exactly so many rows and slots; rows and slots that go must hold nothing that is committed."""
        assert not any(self.lengths[rows:]) and max(self.lengths, default=0) <= slots

        def resized(x: Tensor, row: int, slot: int, fill: int) -> Tensor:
            x = x.narrow(row, 0, min(rows, x.shape[row])).narrow(slot, 0, min(slots, x.shape[slot]))
            for dim, size in ((row, rows), (slot, slots)):
                if (more := size - x.shape[dim]) > 0:
                    shape = list(x.shape)
                    shape[dim] = more
                    x = torch.cat([x, x.new_full(shape, fill)], dim)
            return x.contiguous()

        self._keys = self._values = ()
        self.keys, self.values = resized(self.keys, 1, 3, 0), resized(self.values, 1, 3, 0)
        self.labels, self.ids = resized(self.labels, 1, 2, -1), resized(self.ids, 0, 1, 0)
        self.lengths = [*self.lengths, *[0] * rows][:rows]

    def release(self, row: int) -> None:
        """Forget a row; its place can be taken by another, and nothing is copied."""
        self.lengths[row] = 0

    @torch.inference_mode(False)
    def swap(self, one: int, other: int) -> None:
        """Let the rows `one` and `other` change places; only what they have committed is copied."""
        end, pair = max(self.lengths[one], self.lengths[other]), torch.tensor([one, other], device=self.ids.device)
        for x in (self.keys, self.values):
            x[:, :, :, :end].index_copy_(1, pair, x[:, :, :, :end].index_select(1, pair.flip(0)))
        self.labels[:, :, :end].index_copy_(1, pair, self.labels[:, :, :end].index_select(1, pair.flip(0)))
        self.ids[:, :end].index_copy_(0, pair, self.ids[:, :end].index_select(0, pair.flip(0)))
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    @torch.inference_mode(False)
    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Reorder, drop or repeat rows: row i becomes what `rows[i]` was (numbers, or int64 `[new B]`); all are active
        afterwards."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.ids.device)
        self.keys, self.values = self.keys.index_select(1, index), self.values.index_select(1, index)
        self.labels, self.ids = self.labels.index_select(1, index), self.ids.index_select(0, index)
        self.lengths = [self.lengths[i] for i in index.tolist()]
        self.focus(0, len(self.lengths))

    # What transformers' own generation loop asks of a cache.

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens of the longest row."""
        return max(self.lengths, default=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what `beam_idx[i]` was, int64 `[B]`: beam search."""
        self.select(beam_idx)

    def activate_past_recording(self) -> None:
        """What was committed can be taken back at any time."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many of each row's last tokens; the number is negative, as transformers has it.

        Raises:
            ValueError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}; to remove tokens, give a negative number.")
        self.rewind([max(0, length + tokens_to_remove) for length in self.lengths])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, the copies side by side."""
        self.select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, int64 `[new B]`."""
        self.select(indices)
