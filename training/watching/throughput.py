"""Tokens a second and model FLOPs utilisation, as a job goes."""

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as L
import torch

from hybrid.training.watching.csv_log import step_is_logged, write
from hybrid.training.watching.flops import logit_flops, peak_flops, slot_flops


class Throughput(L.Callback):
    """Logs, for the steps since the last log, `tokens_per_second` (of all processes, waiting for data included;
    validation, samples and saving left out) and `mfu` (0 to 1, see `hybrid.training.watching.flops`), where
    the device's peak is known; else a warning says why not."""

    def __init__(self) -> None:
        self._peak: float | None = None
        self._began = self._aside = 0.0
        self._tokens = self._flops = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._peak, why = peak_flops(pl_module.device, _matrix_dtype(str(trainer.precision)))
        if self._peak is None and trainer.is_global_zero:
            warnings.warn(f"mfu is not logged: {why}.", stacklevel=2)
        self._restart(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._stopped = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._aside += time.perf_counter() - self._stopped

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        found, config = pl_module.last_losses, pl_module.model.config
        ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
        slot = slot_flops(config, ids.shape[1])
        self._flops += found.slots * slot + found.logits * logit_flops(config)
        if not step_is_logged(trainer):
            return
        seconds = time.perf_counter() - self._began - self._aside
        figures = {"tokens_per_second": (pl_module.tokens_seen - self._tokens) / seconds}
        if self._peak is not None and self._flops:
            figures["mfu"] = self._flops / seconds / self._peak
        write(trainer, figures)
        self._restart(pl_module)

    def _restart(self, pl_module: Any) -> None:
        self._began, self._aside = time.perf_counter(), 0.0
        self._tokens, self._flops = pl_module.tokens_seen, 0

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in here is no training, and does not count as time of it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - began


@contextlib.contextmanager
def aside(trainer: L.Trainer) -> Iterator[None]:
    """Stop the clock of the job's `Throughput`, if it has one."""
    with contextlib.ExitStack() as stack:
        for callback in trainer.callbacks:
            if isinstance(callback, Throughput):
                stack.enter_context(callback.aside())
        yield


def _matrix_dtype(precision: str) -> torch.dtype:
    """What the matrices of a job with this precision of Lightning's are multiplied in."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32
