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


class KVCache:
    """Keys and values `[layer, B, H, S, D]` of the text so far.

    Attributes:
        lengths: committed tokens of each row.
        active: how many rows, counted from the first, take part in forwards (finished ones rest behind them).
        ids: int64 `[B, S]`, the token of each slot; only the first `lengths[b]` of a row mean anything.
    """

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
        self.active = batch_size
        self._end = 0
        self._keys, self._values = self.keys.unbind(), self.values.unbind()
        self._slots: Tensor | None = None
        self._written = 0

    @property
    def even(self) -> bool:
        """Whether all active rows have the same length, so that writes and reads are plain slices."""
        return len(set(self.lengths[: self.active])) <= 1

    def open(self, layout: Layout, ids: Tensor) -> Layout:
        """Take T provisional slots behind every active row's length, and label them.

        Args:
            layout: labels of the tokens about to be written, `[active or 1, T]`.
            ids: their ids, int64 `[active, T]`.

        Returns:
            The labels of all slots that this forward may look at, `[active, end]`: the written ones included.
        """
        rows, count = ids.shape
        assert rows == self.active, f"{rows} rows of ids for {self.active} active rows"
        lengths = self.lengths[:rows]
        self._end, self._written = max(lengths) + count, count
        self.reserve(self._end)
        if self.even:
            self._slots = None
            self.labels[:, :rows, lengths[0] : self._end] = layout.labels
            self.ids[:rows, lengths[0] : self._end] = ids
        else:
            start = torch.tensor(lengths, device=ids.device)[:, None]
            self._slots = start + torch.arange(count, device=ids.device)
            # A shorter row's slots beyond this forward hold what was rolled back: nobody may see it.
            beyond = torch.arange(self._end, device=ids.device) >= start
            self.labels[3, :rows, : self._end].masked_fill_(beyond, -1)
            index = self._slots.expand(4, -1, -1)
            self.labels[:, :rows].scatter_(2, index, layout.labels.expand(-1, rows, -1))
            self.ids[:rows].scatter_(1, self._slots, ids)
        # Sliced once for all layers.
        self._keys, self._values = (x[:, :rows, :, : self._end].unbind() for x in (self.keys, self.values))
        return Layout(self.labels[:, :rows, : self._end])

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's `[active, H, T, D]` keys and values; returns all it may look at, `[.., end, D]`."""
        for seen, new in ((self._keys[layer], key), (self._values[layer], value)):
            if self._slots is None:
                seen[:, :, -new.shape[2] :].copy_(new)
            else:
                seen.scatter_(2, self._slots[:, None, :, None].expand_as(new), new)
        return self._keys[layer], self._values[layer]

    def commit(self, n: int | Sequence[int]) -> None:
        """Keep the first `n` tokens of the last forward, one number for all active rows or one each."""
        counts = [n] * self.active if isinstance(n, int) else list(n)
        assert len(counts) == self.active and all(0 <= c <= self._written for c in counts), (
            f"commit({counts}) after a forward of {self._written} tokens over {self.active} rows"
        )
        for row, count in enumerate(counts):
            self.lengths[row] += count
        self._written = 0

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget committed tokens beyond `lengths`, per row; later ones are written over."""
        assert all(0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)

    @torch.inference_mode(False)
    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens a row; growth is at least by half, so that asking often is cheap."""
        have = self.ids.shape[1]
        if slots <= have:
            return
        more = max(slots, have + have // 2) - have

        def grown(x: Tensor, dim: int, fill: int) -> Tensor:
            shape = list(x.shape)
            shape[dim] = more
            return torch.cat([x, x.new_full(shape, fill)], dim)

        self.keys, self.values = grown(self.keys, 3, 0), grown(self.values, 3, 0)
        self.labels, self.ids = grown(self.labels, 2, -1), grown(self.ids, 1, 0)

    @torch.inference_mode(False)
    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Reorder, drop or repeat rows: row i becomes what `rows[i]` was; all are active afterwards."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.ids.device)
        self.keys, self.values = self.keys.index_select(1, index), self.values.index_select(1, index)
        self.labels, self.ids = self.labels.index_select(1, index), self.ids.index_select(0, index)
        self.lengths = [self.lengths[i] for i in index.tolist()]
        self.active = len(self.lengths)

    # What transformers' own generation loop asks of a cache.

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens of the longest row."""
        return max(self.lengths, default=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what `beam_idx[i]` was: beam search."""
        self.select(beam_idx)
