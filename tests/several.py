"""A job in one process or several, as `torchrun` starts them, but forked from one that has everything imported."""

import json
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_job import CONFIG, with_loss
from torch import Tensor
from torch.utils.data import DistributedSampler
from uneven import FIELDS, loader, rows

from hybrid.adapters.lora import LoRA
from hybrid.training.batch import Batch
from hybrid.training.callbacks import SaveModel
from hybrid.training.data import SudokuData
from hybrid.training.job import quiet
from hybrid.training.module import HybridTask
from hybrid.training.objective import Objective
from hybrid.training.objectives.grpo import GRPO
from hybrid.training.optimizer import Optimizer
from hybrid.training.text.rows import Rows


class Noting(HybridTask):
    """Notes samples, losses over all processes and gradient norms; fails or is asked to end where it is told."""

    def __init__(self, poison: tuple[int, int] | None, end: tuple[int, int, int] | None, **given: Any) -> None:
        super().__init__(**given)
        self.poison, self.end = poison, end
        self.seen: list[list[int]] = []
        self.found: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.end and self.end[:2] == (self.global_rank, self.global_step):
            os.kill(os.getpid(), self.end[2])
        loss = super().training_step(batch, batch_idx)
        self.found.append(float(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")))
        return loss

    def _losses(self, batch: Batch, seed: int) -> Any:
        found = super()._losses(batch, seed)
        if self.trainer.training:
            self.seen.append(batch["index"].tolist())
        if self.poison == (self.global_rank, self.global_step) and self.trainer.training:
            return with_loss(found, float("inf"))
        return found

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if name == "gradient_norm":
            self.norms.append(float(value))
        elif name == "lr":
            self.rates.append(value)
        super().log(name, value, *args, **kwargs)


def run(
    folder: Path, *, steps: int, processes: int = 1, strategy: str = "auto", batch_size: int = 8, accumulate: int = 1,
    resume: str | None = None, precision: Any = "32-true", config: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None, ema: bool = False, room: int | None = None, muon_lr: float | None = None,
    seconds: float | None = None, poison: Any = None, end: Any = None, checkpointing: bool = False,
    uneven: bool = False, held_out: int | None = None, grpo: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Train to `steps`, and note all that can be compared. `batch_size` is that of all processes together; `uneven`
    are plain batches of conversations instead of puzzles; `held_out` rows are scored at the end; `grpo` learns from
    what the model writes."""
    torch.set_num_threads(1)
    quiet()
    task = Noting(
        tuple(poison) if poison else None, tuple(end) if end else None,
        config={
            **CONFIG, "num_hidden_layers": 2, "tie_word_embeddings": True, **(FIELDS if uneven else {}),
            **(config or {}),
        },
        optimizer=Optimizer(warmup_steps=2, lr=1e-2, clip_norm=0.5, muon_lr=muon_lr),
        lora=LoRA(**lora) if lora else None, gradient_checkpointing=checkpointing,
        objective=GRPO(**grpo) if grpo else Objective(),
    )  # fmt: skip
    averages = [EMAWeightAveraging(decay=0.9, use_buffers=False)] if ema else []
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy=strategy,
        max_steps=steps, max_time={"seconds": seconds} if seconds else None, precision=precision, logger=False,
        accumulate_grad_batches=accumulate, log_every_n_steps=1,
        callbacks=[SaveModel(str(folder / "model")), *averages], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=2, num_sanity_val_steps=0,
    )  # fmt: skip
    given: dict[str, Any] = {"datamodule": SudokuData(count=50, batch_size=batch_size // processes)}
    if uneven:
        # Lightning's own sampler would shuffle where there are several processes, and nowhere else.
        sampler = DistributedSampler(rows(), processes, trainer.global_rank, shuffle=False)  # type: ignore[arg-type]
        given = {"train_dataloaders": loader(batch_size // processes, sampler=sampler)}
    error, scored = "", {}
    if room is not None and trainer.global_rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        trainer.fit(task, **given, ckpt_path=resume, weights_only=True)
        if held_out is not None:
            kept = given["datamodule"].validation_rows
            given["datamodule"].validation_rows = Rows(*(x[:held_out] for x in (kept.ids, kept.target, kept.doc)))
            trainer.limit_val_batches = 1.0
            (scored,) = trainer.validate(task, given["datamodule"], verbose=False)
    except SystemExit:
        error = "SystemExit"
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    notes = {
        "seen": task.seen, "losses": task.found, "norms": task.norms, "error": error, "rates": task.rates,
        "scored": scored, "step": trainer.global_step, "tokens": task.tokens_seen,
    }  # fmt: skip
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(notes))


def main() -> None:
    """For each line of the input, {folder, processes, …} in JSON: run that job, in processes of its own that leave
    `rank-N.json` in the folder. Prints how they ended, as a list of codes."""
    for line in sys.stdin:
        given = json.loads(line)
        folder, processes = Path(given.pop("folder")), given.get("processes", 1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(processes):
            child = os.fork()
            if child:
                children.append(child)
                continue
            signal.alarm(200)  # who waits for ever is killed, and the test fails
            code = 1
            try:
                if processes > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(processes),
                        LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                        TORCHELASTIC_RUN_ID="test", GLOO_SOCKET_IFNAME="lo",
                    )  # fmt: skip
                run(folder, **given)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()
