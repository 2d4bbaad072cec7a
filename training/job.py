"""One training job from Python, as `hybrid quickstart` runs it; `hybrid train` builds the same from a recipe."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from transformers.utils.logging import disable_progress_bar

from hybrid.training.callbacks import ProgressBar, SaveModel, run_of
from hybrid.training.data import HybridData
from hybrid.training.module import HybridTask
from hybrid.training.running.precision import best_precision
from hybrid.training.watching.csv_log import CSVLog
from hybrid.training.watching.loss_by_noise import LossByNoise
from hybrid.training.watching.throughput import Throughput
from hybrid.training.watching.wandb_log import Tracking, WandbLog


def loggers(
    folder: Path, name: str, wandb: Tracking | None, resume: Path | None = None, *,
    config: dict[str, Any] | None = None, artifact: bool = False,
) -> list[Any]:  # fmt: skip
    """CSV always; wandb too if asked, "offline" without account or network, with the job's settings and, for
    `artifact`, the trained model. `resume` is the checkpoint that the job goes on from: it goes on in the same logs."""
    table = CSVLog(folder, name, resume is not None)
    found: list[Any] = [table]
    if wandb is not None:
        folder.mkdir(parents=True, exist_ok=True)
        run, rows, step = run_of(resume)
        try:
            found.append(
                WandbLog(
                    folder, name, wandb, config=config, artifact=artifact, id=run, rows=rows, cut=table.last >= step
                )
            )
        except ImportError as error:
            warnings.warn(f"there is no wandb here, so figures go to the CSV log alone: {error}", stacklevel=2)
    return found


def watchers() -> list[L.Callback]:
    """What every job logs beside its losses."""
    return [Throughput(), LossByNoise()]


def fit(
    task: HybridTask, data: HybridData, folder: Path, *, minutes: float, title: str = "training",
    wandb: Tracking | None = None, resume: bool = False,
) -> L.Trainer:  # fmt: skip
    """Train for `minutes` and leave the model in `folder`.

    An interrupt (Ctrl-C) also leaves a model that loads, and `resume` goes on from it.

    Args:
        task, data: what is learned, and from what.
        title: of the progress bar.
        wandb: log to Weights & Biases beside the CSV file in `logs/`; "offline" needs no account.

    Returns:
        The trainer, at its end.
    """
    quiet()
    saver = SaveModel(str(folder))
    state = saver.state_file if resume and saver.state_file.exists() else None
    logs = loggers(folder.parent, folder.name, wandb, state)
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_time={"seconds": 60 * minutes}, max_steps=-1, precision=best_precision(),
        logger=logs, callbacks=[*watchers(), ProgressBar(title), saver],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
        limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    try:
        trainer.fit(task, data, ckpt_path=state, weights_only=True)
    finally:
        for log in logs:  # or the next job of this process would go on in the same run
            if isinstance(log, WandbLog):
                log.finish()
    return trainer


def quiet() -> None:
    """Silence advice about settings that were chosen on purpose, and libraries' notes to each other."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    disable_progress_bar()
    for message in (
        "does not have many workers", "Checkpoint directory", "number of training batches", "LightningCLI's args",
        "treespec, LeafSpec", "exists and is not empty", "dataloader is not resumable",
        "WeightAveraging callback with a model that overrides",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=f".*{message}.*")
