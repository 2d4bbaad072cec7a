"""What Lightning keeps to itself and this library has to know, in one place: a new version of Lightning that renames
something breaks this file, and three classes that are made from its own (`OVERRIDDEN`).
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Timer, WeightAveraging
from torch.optim import Optimizer

# The private names of Lightning's that our classes override, ask or set.
OVERRIDDEN = {
    "HybridCLI": {"_parse_ckpt_path", "_parser", "_prepare_subcommand_kwargs", "_prepare_subcommand_parser"},
    "Sharded": {"_data_parallel_size"},
    "WandbLog": {"_experiment", "_wandb_init"},
}


def accumulates(trainer: L.Trainer) -> bool:
    """Whether the step that this batch belongs to is not done with it."""
    return bool(trainer.fit_loop._should_accumulate())


def logs_now(trainer: L.Trainer) -> bool:
    """Whether the figures of this batch are those that loggers get."""
    return bool(trainer._logger_connector.should_update_logs)


def is_attached(task: L.LightningModule) -> bool:
    """Whether a task has a trainer; to ask for it would raise."""
    return task._trainer is not None


def on_device(task: L.LightningModule, raw: Any) -> Any:
    """What Lightning makes of a loader's batch before a step sees it."""
    batch = task.trainer.precision_plugin.convert_input(raw)
    batch = task._on_before_batch_transfer(batch, dataloader_idx=0)
    return task.trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def share_of_time(trainer: L.Trainer) -> float:
    """How much of the trainer's `max_time` has passed, 0 to 1; 0 without one."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    return max((timer.time_elapsed() / timer._duration for timer in timers if timer._duration), default=0.0)


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
    """The batches, as the loader gives them, that are still to come in the step that batch `batch_idx` begins: with
    accumulated gradients, a mean over the step has to know them all."""
    count = min(trainer.accumulate_grad_batches, trainer.num_training_batches - batch_idx) - 1
    fetcher: Any = trainer.fit_loop._data_fetcher
    if count < 1 or fetcher is None:
        return []
    # Lightning counts what it has taken from here, and with it tells where the epoch ends: nothing of that changes.
    if not isinstance(fetcher.iterator, Ahead):
        fetcher.iterator = Ahead(fetcher.iterator)
    waiting = list(getattr(fetcher, "batches", []))[:count]  # of loaders whose length is not known, one is taken before
    return [item[0] for item in (*waiting, *fetcher.iterator.peek(int(count) - len(waiting)))]


def number_figures(trainer: L.Trainer, step: int) -> None:
    """Let the next figures be logged as those of `step`."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def places_of_loaders(trainer: L.Trainer) -> list[dict[str, Any]]:
    """Where the training loaders are, of those that can tell."""
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    return loader._state_dicts()


def bare(optimizer: Any) -> Optimizer:
    """The optimizer itself, which Lightning wraps."""
    found: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return found


@contextmanager
def averaged(trainer: L.Trainer, task: L.LightningModule) -> Iterator[None]:
    """With averaged weights in place of the task's own, where a callback averages them."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    for average in averages:
        average._swap_models(task)
    try:
        yield
    finally:
        for average in averages:
            average._swap_models(task)
