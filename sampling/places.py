"""Which row of a cache belongs to which text, how large the cache is, and for how many tokens there is memory."""

import os

import torch

from hybrid import HybridForCausalLM, KVCache
from hybrid.sampling.row import Row

SHARE = 0.5  # of the memory that is free


class Places:
    """The rows that are being decoded, by their places in a cache.

    A row that leaves is forgotten where it lies, and the next one takes its place: nothing is copied. `close_gaps`
    moves the last row into a gap, so that no forward computes what is not there.

    Attributes:
        rows: by place.
        cache: None where every forward is over the whole text.
        handed_out: what rows leave in the cache is kept: it is the caller's.
    """

    def __init__(self, cache: KVCache | None, handed_out: bool) -> None:
        self.rows: dict[int, Row] = {}
        self.cache, self.handed_out = cache, handed_out
        self.left: dict[int, Row] = {}

    @property
    def size(self) -> int:
        """Tokens that the cache has room for, over all rows."""
        return 0 if self.cache is None else self.cache.ids.numel()

    def fits(self, row: Row, slots: int, room: int | None) -> bool:
        """Whether one more row has room in a cache of at most `room` tokens (None: no bound); the cache then has it.

        Args:
            slots: rows that there will be at most.
        """
        cache = self.cache
        if cache is None or self.handed_out:
            return True
        count, longest = len(self.rows) + 1, max(needed(other) for other in (*self.rows.values(), row))
        if room is not None and count * longest > room:
            return False
        rows, width = cache.ids.shape
        if count > rows or longest > width:
            # By half at least, so that joining often is cheap.
            more = rows if count <= rows else max(count, min(slots, rows + rows // 2))
            wider = width if longest <= width else max(longest, width + width // 2)
            if room is not None and more * wider > room:
                more, wider = (count, wider) if count * wider <= room else (count, longest)
                self.close_gaps()
            cache.resize(more, wider)
        return True

    def take(self, row: Row) -> None:
        """Give a row the first free place."""
        row.place = next(i for i in range(len(self.rows) + 1) if i not in self.rows)
        self.rows[row.place] = row

    def leave(self, row: Row) -> None:
        """Free a row's place."""
        del self.rows[row.place]
        if self.handed_out:
            self.left[row.place] = row
        elif self.cache is not None:
            self.cache.release(row.place)

    def close_gaps(self) -> None:
        """Let the rows have the first places."""
        while (top := max(self.rows, default=0)) >= len(self.rows) > 0:
            gap = next(i for i in range(top) if i not in self.rows)
            row = self.rows.pop(top)
            if self.cache is not None:
                self.cache.swap(top, gap)
            if (other := self.left.pop(gap, None)) is not None:
                other.place = top
                self.left[top] = other
            row.place = gap
            self.rows[gap] = row


def needed(row: Row) -> int:
    """Slots of a cache that a row may come to use, provisional ones included."""
    return row.limit + row.plan.scheme.spare(row.plan)


def found_tokens(model: HybridForCausalLM) -> int:
    """Tokens whose keys and values fill half of the memory that is free now on the model's device."""
    config = model.config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return max(1, int(SHARE * free_bytes(model)) // each)


def free_bytes(model: HybridForCausalLM) -> int:
    """Of memory, on the model's device."""
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
