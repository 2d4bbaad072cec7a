"""What a job does beside learning: show where it is, and leave a model that loads."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hybrid.training.module import HybridTask


def save_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer as one folder that `from_pretrained` loads; the old one stays until it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class SaveModel(L.Callback):
    """Keeps `folder` (model and tokenizer) and `last.ckpt` beside it (all that resuming needs) up to date.

    Both are written at the end, every `minutes`, and when the user interrupts; not after a failure, so that what
    was saved last stays as it was.
    """

    def __init__(self, folder: str = "runs/model", minutes: float = 10.0) -> None:
        self.folder, self.minutes = Path(folder), minutes
        self._saved_at = time.monotonic()

    @property
    def state_file(self) -> Path:
        """What resuming needs: weights, optimizer, schedule, place in the data."""
        return self.folder.parent / f"{self.folder.name}.ckpt"

    def save(self, trainer: L.Trainer, task: HybridTask) -> None:
        # Sharded strategies gather the weights here, so every process takes part; one writes the folder.
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        new = self.state_file.with_name(f".{self.state_file.name}.new")
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            os.replace(new, self.state_file)
            save_folder(task.model, trainer.datamodule.tokenizer, self.folder)
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if time.monotonic() - self._saved_at > 60 * self.minutes:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.save(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and pl_module.model is not None and trainer.global_step:
            self.save(trainer, pl_module)


class ProgressBar(L.Callback):
    """One line that says how far the job is, its losses, tokens a second and the time left; in a log file, a line
    every `seconds`."""

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
