"""The batches of a step before their turn: with accumulated gradients, a mean over the step has to know them all."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L

from hybrid.training.running.innards import fetcher_of


class Ahead(Iterator[Any]):
    """An iterator whose next items can be looked at; it still gives them in their turn."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source, self._waiting = source, deque[Any]()

    def __next__(self) -> Any:
        return self._waiting.popleft() if self._waiting else next(self._source)

    def peek(self, count: int) -> list[Any]:
        """The next `count` items, or as many as there are."""
        while len(self._waiting) < count:
            try:
                self._waiting.append(next(self._source))
            except StopIteration:
                break
        return list(self._waiting)[:count]


def rest_of_step(trainer: L.Trainer, batch_idx: int) -> list[Any]:
    """The batches, as the loader gives them, that are still to come in the step that batch `batch_idx` begins."""
    count = min(trainer.accumulate_grad_batches, trainer.num_training_batches - batch_idx) - 1
    fetcher = fetcher_of(trainer)
    if count < 1 or fetcher is None:
        return []
    # Lightning counts what it has taken from here, and with it tells where the epoch ends: nothing of that changes.
    if not isinstance(fetcher.iterator, Ahead):
        fetcher.iterator = Ahead(fetcher.iterator)
    waiting = list(getattr(fetcher, "batches", []))[:count]  # of loaders whose length is not known, one is taken before
    return [item[0] for item in (*waiting, *fetcher.iterator.peek(int(count) - len(waiting)))]
