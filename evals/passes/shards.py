"""One evaluation over several processes, started by `torchrun`: each takes whole batches of the prompts.

Whole batches, so that every forward is the one that a single process would have run and the results are the same to
the last bit. What is exchanged is JSON, where `torch.distributed` would pickle objects.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Which process this is, of how many."""

    rank: int = 0
    count: int = 1

    def mine(self, prompts: int, batch_size: int) -> list[int]:
        """The numbers of this process's prompts: every `count`-th batch."""
        return [i for i in range(prompts) if i // batch_size % self.count == self.rank]

    def gather(self, record: Any) -> list[Any]:
        """What JSON can hold, from every process, in the order of their ranks."""
        if self.count == 1:
            return [record]
        own = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))))
        return [json.loads(part[: int(n)].numpy().tobytes()) for part, n in zip(parts, sizes, strict=True)]

    def share(self, record: Any) -> Any:
        """What the first process has, for all."""
        return self.gather(record if self.rank == 0 else None)[0]

    def merged(self, parts: Sequence[Sequence[Any]], prompts: int, batch_size: int) -> list[Any]:
        """One list by the prompts' numbers, from each process's list by its own."""
        found: list[Any] = [None] * prompts
        for rank, part in enumerate(parts):
            for i, value in zip(Shards(rank=rank, count=self.count).mine(prompts, batch_size), part, strict=True):
                found[i] = value
        return found


ALONE = Shards()


def shards_of_environment() -> Shards:
    """The processes that `torchrun` started, or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    if not dist.is_initialized():
        # The first process measures latencies while the others wait for it.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    return Shards(rank=dist.get_rank(), count=dist.get_world_size())
