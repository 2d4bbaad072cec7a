"""What a job does beside learning: show where it is, and leave a model that loads."""

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hybrid.common.checks import require
from hybrid.common.files import SaveError
from hybrid.training.module import HybridTask
from hybrid.training.running.checkpoint import SafeCheckpointIO, check_writable, read_checkpoint, save_folder
from hybrid.training.running.innards import accumulates, averaged, number_figures, places_of_loaders
from hybrid.training.running.processes import anywhere, together
from hybrid.training.running.randomness import random_states, restore_random_states
from hybrid.training.watching.csv_log import CSVLog
from hybrid.training.watching.throughput import aside
from hybrid.training.watching.wandb_log import WandbLog


class SaveModel(L.Callback):
    """Keeps `folder` (model and tokenizer) and `folder`.ckpt beside it (all that resuming needs) up to date.

    Both are written at the end, every `minutes`, on SIGTERM and when the user interrupts; not after a failure, so that
    what was saved last stays as it was. Each is replaced whole (see `hybrid.training.running.checkpoint`), and
    checkpoints of this trainer are read as data only.

    The folder has averaged weights where a callback averages them (EMA), and merged ones where low-rank deltas are
    trained, with the deltas in its folder `adapter`, in peft's format. The checkpoint has all of them apart.

    SIGTERM or Ctrl-C ends the job after the step it is in, and the validation behind that, if there is one; a second
    Ctrl-C at once, without saving what is half done. Of several processes, one that is asked to end ends them all
    together. A trial run (`fast_dev_run`) saves nothing.

    Args:
        folder: of the model.
        minutes: between two savings; 0: after every step.

    Raises:
        ValueError: `minutes` is negative.
    """

    def __init__(self, folder: str = "runs/model", minutes: float = 10.0) -> None:
        require(minutes >= 0, f"minutes is {minutes}; it must not be negative (0: after every step).")
        self.folder, self.minutes = Path(folder), minutes
        self._saved_at, self._saved_step = time.monotonic(), math.inf  # nothing to save before the start
        self._interrupted = self._terminated = self._in_step = False
        self._accumulated = 1  # batches a step
        self._random_states: list[dict[str, Any]] | None = None
        self._run: tuple[str, int] | None = None  # of wandb, see `WandbLog.place`
        self._loaders: list[dict[str, Any]] = []  # where they were when the last step was done

    @property
    def state_file(self) -> Path:
        """What resuming needs: weights, optimizer, schedule, place in the data."""
        return self.folder.parent / f"{self.folder.name}.ckpt"

    def save(self, trainer: L.Trainer, task: HybridTask) -> None:
        """Write the folder, then the checkpoint.

        Raises:
            SaveError: one of them could not be written; what was there is intact.
        """
        if trainer.fast_dev_run:  # a trial run, which must not take the place of what was trained
            return
        # In this order: after a kill between the two, the job does the last steps again and writes both. The other way
        # round, a job that was at its end would have nothing left to do, and an old folder.
        with averaged(trainer, task), together(SaveError):
            model, state = task.whole_model()
            if trainer.is_global_zero:
                self._write_folder(model, state, trainer, task)
        self._run = next(filter(None, [logger.place for logger in _runs(trainer)]), self._run)
        with together(SaveError):
            try:
                trainer.save_checkpoint(self.state_file)  # sharded strategies gather the weights here
            except SaveError:
                trainer.strategy.barrier()  # where Lightning lets the other processes wait for the writing
                raise
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def _write_folder(self, model: Any, state: Any, trainer: L.Trainer, task: HybridTask) -> None:
        def deltas(folder: Path) -> None:
            if task.lora is not None:
                task.lora.save(state, folder / "adapter")

        if (artifact := task.artifact()) is not None:
            save_folder(artifact, None, self.folder)
            return
        facts = {"optimizer steps": f"{trainer.global_step:,}", "tokens seen": f"{task.tokens_seen:,}"}
        save_folder(model, task.tokenizer, self.folder, facts | _settings(task.objective), deltas)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) not in (TorchCheckpointIO, SafeCheckpointIO):
            raise ValueError(
                f"trainer.plugins: {type(trainer.strategy.checkpoint_io).__name__} writes checkpoints, and so does "
                "SaveModel, in a way that a kill does not spoil: leave one of them out."
            )
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
        self._accumulated = trainer.accumulate_grad_batches
        if stage != "fit":
            return
        with together(SaveError):
            if trainer.is_global_zero:
                check_writable(self.folder)
        place = trainer.callbacks.index(self)
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks[:place]):
            raise ValueError(
                "callbacks: one that averages weights puts the averages in place of the weights when training ends. "
                "List it behind SaveModel, which saves both."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._interrupted = self._terminated = self._in_step = False
        self._saved_step = trainer.global_step
        # A job that goes on with larger batches, and so with shorter epochs, may be behind the end of this one.
        here, epoch = trainer.fit_loop.epoch_loop.batch_progress.current, trainer.num_training_batches
        if here.ready > epoch:
            beyond = int(here.ready % epoch) // trainer.accumulate_grad_batches * trainer.accumulate_grad_batches
            here.ready = here.started = here.processed = here.completed = beyond
        if threading.current_thread() is threading.main_thread():
            # Lightning puts the former ones back at the end. Its own for SIGTERM ends a validation half-way, which is
            # not taken up again on resuming, and talks to other processes in the midst of whatever these exchange.
            signal.signal(signal.SIGINT, self._on_interrupt)
            signal.signal(signal.SIGTERM, self._on_terminate)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        os.write(2, b"\nending after this step; Ctrl-C again ends at once, without saving\n")  # safe in a handler

    def _on_terminate(self, number: int, frame: Any) -> None:
        self._terminated = True

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # Not earlier: making the loader's iterator draws from them.
        if self._random_states is not None:
            restore_random_states(self._random_states)
            self._random_states = None
            # The number that figures are logged under. Going on right after a validation, Lightning counts it twice.
            number_figures(trainer, trainer.global_step)
        # The step before has been logged and validated by now, so nothing of it is lost.
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step > self._saved_step:
            due = time.monotonic() - self._saved_at > 60 * self.minutes
            interrupted, terminated, due = anywhere(
                self._interrupted, self._terminated, due, device=trainer.strategy.root_device
            )
            if interrupted:
                raise KeyboardInterrupt
            if terminated:
                raise SIGTERMException
            if due:
                with aside(trainer):
                    self.save(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self._in_step = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self._in_step = False
        if not accumulates(trainer):
            self._loaders = places_of_loaders(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # A loader that tells where it is has given batches beyond the last whole step: the one that is about to begin,
        # and those of a step that is not done.
        loop = checkpoint["loops"]["fit_loop"]["state_dict"]
        if self._loaders and loop.get("combined_loader"):
            loop["combined_loader"] = self._loaders

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module)
        for logger in _runs(trainer):
            logger.keep(self.folder)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        asked = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if asked and trainer.global_step > self._saved_step and not self._in_step:
            self.save(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        name, rows = self._run or (None, 0)
        return {
            "random_states": random_states(), "accumulated": self._accumulated, "wandb": name, "wandb_rows": rows,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random_states = state_dict["random_states"]
        if (name := state_dict.get("wandb")) is not None:
            self._run = name, state_dict.get("wandb_rows", 0)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        tables = [logger for logger in trainer.loggers if isinstance(logger, CSVLog) and trainer.is_global_zero]
        last = max((table.last for table in tables), default=-1)
        for table in tables:
            table.rewind(checkpoint["global_step"])
        for logger in _runs(trainer):
            logger.rewind(last)
        # Saved at the start of a batch: that batch has not been seen. And gradients are not saved, so a step that was
        # not done begins anew, with its first batch.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        current = progress["current"]
        a_step = trainer.accumulate_grad_batches
        before = checkpoint["callbacks"].get(self.state_key, {}).get("accumulated", a_step)
        surplus = current["processed"] % before
        if surplus or a_step != before or current["ready"] > current["started"]:
            total, begun = progress["total"], (current["processed"] - surplus) // before * a_step
            total.update(dict.fromkeys(total, total["processed"] + begun - current["processed"]))
            current.update(dict.fromkeys(current, begun))


class ProgressBar(L.Callback):
    """One line that says how far the job is, its losses, tokens a second and the time left; in a log file, a line
    every `seconds`. It begins with `title`."""

    def __init__(self, title: str = "training", seconds: float = 30.0) -> None:
        self.title, self.seconds = title, seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.began = self.told = time.monotonic()
        self.tokens_before = pl_module.tokens_seen
        self.console = Console(file=sys.stderr)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            console=self.console, disable=not (self.console.is_terminal and trainer.is_global_zero),
        )  # fmt: skip
        self.bar.start()
        self.task = self.bar.add_task(self.title, total=1.0, figures="")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        speed = (pl_module.tokens_seen - self.tokens_before) / (time.monotonic() - self.began)
        shown = [f"step {trainer.global_step}", f"{speed:,.0f} tokens/s"]
        for name, figure in (("AR", "train/ar"), ("diffusion", "train/diffusion")):
            if figure in trainer.callback_metrics:
                shown.append(f"{name} {float(trainer.callback_metrics[figure]):.3f}")
        done, figures = pl_module.progress(), ", ".join(shown)
        self.bar.update(self.task, completed=done, figures=figures)
        if self.bar.disable and trainer.is_global_zero and time.monotonic() - self.told > self.seconds:
            self.told = time.monotonic()
            print(f"{self.title} {done:.0%} {figures}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.bar.update(self.task, completed=1.0)
        self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


def _runs(trainer: L.Trainer) -> list[WandbLog]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLog)]


def _settings(component: Any) -> dict[str, Any]:
    """A component's settings by name, those of its noise beside its own."""
    if not dataclasses.is_dataclass(component):
        return {"objective": type(component).__name__}
    found = dataclasses.asdict(component)  # type: ignore[arg-type]
    return found | (found.pop("noise", None) or {})


def run_of(state_file: Path | None) -> tuple[str | None, int, int]:
    """The wandb run that a job's checkpoint goes on with, if it had one, how many rows that had, and the job's step."""
    if state_file is None:
        return None, 0, 0
    found = read_checkpoint(state_file, mmap=True)
    for state in found.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("wandb"):
            return state["wandb"], state.get("wandb_rows", 0), found["global_step"]
    return None, 0, found["global_step"]
