"""What a training step costs: the recipe's own job, step by step beside others, on the same batch.

Steps take their turns in one process (`hybrid.evals.timing.bench.take_turns`), so that a machine whose speed drifts
is fair to all of them.
"""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hybrid import HybridForCausalLM, Layout
from hybrid.common.checks import require
from hybrid.noise import corrupt
from hybrid.training.batch import Batch, each
from hybrid.training.cli import HybridCLI
from hybrid.training.data import HybridData
from hybrid.training.objective import Objective, losses

NEXT_BATCH = "train_dataloader_next"  # part of Lightning's name for waiting for data
WHOLE_EPOCH = "run_training_epoch"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that was run for a few steps, ready to take more.

    Attributes:
        model, data, objective, optimizer: as the recipe makes them.
        batch: of the job's data, the first.
        autocast: the context of the recipe's precision.
        clip_norm: see `Optimizer`.
        device: where all of this is.
        waiting: share of the job's time, 0 to 1, in which a step waited for data.
        peak_memory: bytes; of the process on a CPU (what it had before included), of tensors on a GPU.
    """

    model: HybridForCausalLM
    data: HybridData
    objective: Objective
    optimizer: torch.optim.Optimizer
    batch: Batch
    autocast: Callable[[], Any]
    clip_norm: float
    device: torch.device
    waiting: float
    peak_memory: int

    @property
    def tokens(self) -> int:
        """Real tokens of the batch: padding and noisy copies are not counted."""
        return int((self.batch["doc"] >= 0).sum())

    def step(self) -> None:
        """One optimizer step as the job takes it, without its logs."""
        with self.autocast():
            found = losses(self.model, self.batch, self.objective, 0)
        self._apply(found.total)

    def plain_step(self) -> None:
        """The same by `plain_loss`, for a job in float32."""
        self._apply(plain_loss(self.model, self.batch, self.objective, 0))

    def _apply(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run_job(recipe: Path, steps: int, *options: str, data: HybridData | None = None) -> Job:
    """Run the recipe's job for `steps` optimizer steps, without logs, validation and saving.

    Args:
        options: of `hybrid train fit`, as words; they go above the recipe.
        data: of a job that was run before, not to be prepared again.

    Raises:
        ValueError: `steps` is below 1.
    """
    require(steps >= 1, f"steps is {steps}; the job needs at least one.")
    cli = HybridCLI.read(["--config", str(recipe), f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0",
                          *options])  # fmt: skip
    trainer, task = cli.trainer, cli.model
    if not isinstance(task.objective, Objective):
        raise ValueError(f"recipe: {recipe} learns {type(task.objective).__name__}; name one of a joint objective.")
    trainer.callbacks = []
    trainer.profiler = SimpleProfiler()
    data = data or cli.datamodule
    trainer.fit(task, data, weights_only=True)
    spent = trainer.profiler.recorded_durations
    waited, whole = (
        sum(sum(times) for name, times in spent.items() if part in name) for part in (NEXT_BATCH, WHOLE_EPOCH)
    )
    device = trainer.strategy.root_device
    batch = next(iter(data.train_dataloader()))
    task.model.to(device)
    optimizer = trainer.optimizers[0]
    return Job(
        model=task.model, data=data, objective=task.objective.at(1.0), optimizer=optimizer,
        batch=each(batch, lambda tensor: tensor.to(device)), autocast=trainer.precision_plugin.forward_context,
        clip_norm=task.optimizer.clip_norm, device=device, waiting=waited / whole, peak_memory=_peak_memory(device),
    )  # fmt: skip


def plain_loss(model: HybridForCausalLM, batch: Batch, objective: Objective, seed: int) -> Tensor:
    """The joint loss as anyone would write it first: one dense mask, logits of every slot, no fast path.

    It says the same as `losses` for a model with causal clean text and the settings of the laptop recipe (per-token
    denominator, no z-loss, no weights on padding), and is what its speed is compared with.
    """
    ids, target, doc = batch["input_ids"], batch["target"], batch["doc"]
    length = ids.shape[1]
    noised = corrupt(ids, target, doc, batch["index"], objective.noise, model.config, seed)
    place = torch.arange(length, device=ids.device).expand_as(ids)
    both = Layout.of(place, place, 0, doc).cat(noised.layout)
    logits = model(torch.cat([ids, noised.tokens], 1), layout=both).logits
    logits[..., model.config.mask_token_id] = -torch.inf
    wanted = torch.where(target[:, 1:] & (doc[:, 1:] == doc[:, :-1]), ids[:, 1:], -100)
    ar = F.cross_entropy(logits[:, : length - 1].flatten(0, 1), wanted.flatten())
    hidden = torch.where(noised.masked, ids.gather(1, noised.layout.position), -100)
    nll = F.cross_entropy(logits[:, length:].flatten(0, 1), hidden.flatten(), reduction="none").view_as(hidden)
    diffusion = (noised.weight * nll).sum() / target.sum()
    return objective.ar_weight * ar + objective.diffusion_weight * diffusion


def step_profile(step: Callable[[], None], device: torch.device, rows: int = 15) -> str:
    """A table of where three steps spend their time, by operator, the largest first."""
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=kinds) as found:
        for _ in range(3):
            step()
    key = f"self_{device.type}_time_total"
    return str(found.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=50))


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
