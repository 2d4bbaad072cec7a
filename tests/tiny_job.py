"""A job of a second, to be run in a process of its own, killed there and run again."""

import os
import random
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor

from hybrid.training.batch import Batch
from hybrid.training.callbacks import SaveModel
from hybrid.training.component import Losses
from hybrid.training.data import SudokuData
from hybrid.training.job import loggers, quiet
from hybrid.training.module import HybridTask
from hybrid.training.optimizer import Optimizer

CONFIG = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "block_size": 4,
}  # fmt: skip


def with_loss(found: Losses, added: float) -> Losses:
    """The same with something added to what is learned."""
    name = next(iter(found.counts))
    part = found.parts[name]
    return replace(found, parts={**found.parts, name: replace(part, total=part.total + added)})


class Noting(HybridTask):
    """Writes every loss, bit for bit, the samples it is of, and what the global random states give, to `notes`.

    As in a model with dropout, a random number decides part of the loss.
    """

    def __init__(self, notes: Path) -> None:
        super().__init__(CONFIG, optimizer=Optimizer(warmup_steps=5))
        self.notes = notes

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draws = [torch.rand(()).item(), random.random(), np.random.random()]  # noqa: NPY002
        loss = super().training_step(batch, batch_idx) * (0.5 + sum(draws) / 3)
        first = int(batch["index"][0])
        with self.notes.open("a") as notes:
            notes.write(f"{first} {loss.item().hex()} {' '.join(draw.hex() for draw in draws)}\n")
        return loss


def run(
    folder: Path, steps: int, accumulate: int = 1, minutes_between_saves: float = 0.0, *callbacks: L.Callback
) -> None:  # fmt: skip
    """Train in `folder` until that many steps are done, going on where an earlier run stopped."""
    torch.set_num_threads(1)
    quiet()
    saver = SaveModel(str(folder / "model"), minutes_between_saves)
    resume = saver.state_file.exists()
    if not resume:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, accumulate_grad_batches=accumulate,
        callbacks=[saver, *callbacks],
        logger=loggers(folder, "model", None, saver.state_file if resume else None), log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=2,
        val_check_interval=5 * accumulate, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    )  # fmt: skip
    data = SudokuData(count=50, batch_size=4)  # several passes
    trainer.fit(Noting(folder / "notes"), data, ckpt_path=saver.state_file if resume else None)


def main() -> None:
    """For each line "folder steps accumulate" of the input: run that job in a process of its own, which begins with
    everything imported. Prints that process's number, and how it ended as soon as it has."""
    for line in sys.stdin:
        folder, steps, accumulate = line.split("\t")
        child = os.fork()
        if not child:
            code = 1
            try:
                run(Path(folder), int(steps), int(accumulate))
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
