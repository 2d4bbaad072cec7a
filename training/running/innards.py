"""What Lightning keeps to itself and this library has to know, in one place: a new version of Lightning that renames
something breaks this file, and the classes that are made from its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Timer, WeightAveraging


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


def fetcher_of(trainer: L.Trainer) -> Any:
    """What takes batches from the training loaders; None before the first."""
    return trainer.fit_loop._data_fetcher


def number_figures(trainer: L.Trainer, step: int) -> None:
    """Let the next figures be logged as those of `step`."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def places_of_loaders(trainer: L.Trainer) -> list[dict[str, Any]]:
    """Where the training loaders are, of those that can tell."""
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    return loader._state_dicts()


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
