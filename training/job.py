"""One training job from Python, as `hybrid quickstart` runs it; `hybrid train` builds the same from a recipe."""

import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.loggers import WandbLogger
from transformers.utils.logging import disable_progress_bar

from hybrid.training.callbacks import ProgressBar, SaveModel
from hybrid.training.csv_log import CSVLog
from hybrid.training.data import HybridData
from hybrid.training.module import HybridTask
from hybrid.training.precision import best_precision

Tracking = Literal["offline", "online"]


def loggers(folder: Path, name: str, wandb: Tracking | None, resume: bool = False) -> list[Any]:
    """CSV always; wandb too if asked, "offline" without account or network."""
    found: list[Any] = [CSVLog(folder, name, resume)]
    if wandb is not None:
        folder.mkdir(parents=True, exist_ok=True)
        found.append(WandbLogger(name=name, save_dir=folder, project="hybrid", offline=wandb == "offline"))
    return found


def fit(
    task: HybridTask, data: HybridData, folder: Path, *, minutes: float, title: str = "training",
    wandb: Tracking | None = None, resume: bool = False,
) -> L.Trainer:  # fmt: skip
    """Train for `minutes` and leave the model in `folder`.

    An interrupt (Ctrl-C) also leaves a model that loads, and `resume` goes on from it.
    """
    quiet()
    saver = SaveModel(str(folder))
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_time={"seconds": 60 * minutes}, max_steps=-1, precision=best_precision(),
        logger=loggers(folder.parent, folder.name, wandb, resume), callbacks=[ProgressBar(title), saver],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
        limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    state = saver.state_file if resume and saver.state_file.exists() else None
    try:
        trainer.fit(task, data, ckpt_path=state, weights_only=True)
    finally:
        if wandb is not None:  # or the next job of this process would go on in the same run
            import wandb as service

            service.finish()
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
