"""What a job does with a batch. In the order in which Lightning calls it, for each step of the optimizer:

    1. `training_step`, first batch: where the job is (`progress`), which the objective is told (`begin_step`);
    2. every batch: its rows get their numbers (`_numbered`), which decide their noise, and the objective says what they
       add to the step (`Component.loss`);
    3. first batch: what the other batches and processes will add is counted (`_begin_step`), so that
    4. every batch: its share of one mean over the whole step goes back;
    5. last batch: the step's means are logged;
    6. `configure_gradient_clipping`: the gradient's norm is looked at, and cut. What the step has seen is learned now;
    7. the optimizer and the schedule of `HybridTask.configure_optimizers`, which asks for `progress`.

Validation and test: `validation_step` for every batch, `_end_evaluation` for the means. `predict_step` is by itself.
"""

import math
from operator import itemgetter
from typing import Any, NoReturn

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybrid import HybridForCausalLM
from hybrid.texts import decode
from hybrid.training.batch import Batch, as_batch, each
from hybrid.training.component import Component, Losses, Means, wide
from hybrid.training.data import HybridData
from hybrid.training.optimizer import Optimizer
from hybrid.training.running.innards import (
    accumulates,
    is_attached,
    logs_now,
    on_device,
    rest_of_step,
    share_of_time,
)
from hybrid.training.running.processes import of_first, several, summed
from hybrid.training.text.rows import NOBODY


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the weights have not been changed by it."""


class Steps(L.LightningModule):
    """The steps of a task; what they are steps of is `HybridTask`'s.

    Attributes:
        model: None before the trainer asks for it.
        beside: what the objective keeps beside the model, if anything.
        tokens_seen: by the job, of all processes.
        last_losses: of the last training batch, for callbacks.
    """

    objective: Component
    optimizer: Optimizer
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self.model: HybridForCausalLM | None = None
        self.beside: nn.Module | None = None
        self.tokens_seen = self._tokens_learned = 0
        self._rows_seen = self._rows_learned = 0  # of all processes: rows without a number of their own go on from here
        self._clock = self._begun_at = 0.0
        self._counts: dict[str, Tensor] = {}  # of the step that is being made
        self._means = Means()
        self._held_out: dict[int, Means] = {}
        self._held_out_rows = 0
        self.last_losses: Losses | None = None
        self._lost = ""  # what was not finite in this process, before all of them heard of it

    @property
    def data(self) -> HybridData | None:
        """The job's data, where they are of this library."""
        found = getattr(self.trainer, "datamodule", None)
        return found if isinstance(found, HybridData) else None

    @property
    def tokenizer(self) -> Any:
        """The data's; None if they have none, or have still to make it."""
        return getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None) if is_attached(self) else None

    def progress(self) -> float:
        """How much of the job is done, 0 to 1: by steps, by epochs or by the clock, whichever is furthest."""
        trainer, done = self.trainer, 0.0
        if trainer.max_steps > 0:
            done = trainer.global_step / trainer.max_steps
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            done = max(done, self._epochs_passed() / trainer.max_epochs)
        return min(1.0, max(done, self._clock if several() else share_of_time(self.trainer)))

    def _epochs_passed(self) -> float:
        """Epochs and the share of this one, in whole steps; of loaders whose length is not known, only epochs."""
        loop, a_step = self.trainer.fit_loop, self.trainer.accumulate_grad_batches
        passed = loop.epoch_loop.batch_progress.current.processed
        if passed < loop.max_batches:
            passed -= passed % a_step
        return float(self.trainer.current_epoch + passed / loop.max_batches if loop.max_batches else 0)

    # All in the steps themselves, and nothing in hooks around them: whoever overrides a hook need not know of ours.

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.model is not None
        if several():  # whose clocks differ, and with them the learning rates would
            self._clock = of_first(share_of_time(self.trainer), self.device)
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if first:
            self._begun_at, self._means = self.progress(), Means()
            self.objective.begin_step(self.model, self.global_step, self.beside)
        whole = self._numbered(batch)
        found = self._losses(whole, self.seed)
        if first:
            self._begin_step(found, whole, batch_idx)
        self._rows_seen += len(whole["index"]) * self.trainer.world_size
        # Shares of the step's loss. Lightning divides by the batches of a step, and its strategies by the processes.
        total = found.share(self._counts) * self.trainer.accumulate_grad_batches * self.trainer.world_size
        if not torch.isfinite(total) and several():
            # Leaving alone, this process would let the others wait in the backward pass. A gradient that is not finite
            # either goes to all of them, and stops them together.
            self._lost, total = f"the loss is {total.item()}", total * math.nan
        elif not torch.isfinite(total):
            self._stop(f"the loss is {total.item()}")
        self.last_losses = found.detached()
        self._means.add(found)
        if not accumulates(self.trainer):
            self.log("tokens", float(self.tokens_seen))
            # (Only where they will be seen is it worth the time to ask the other processes.)
            if logs_now(self.trainer) or not several():
                self._log("train", self._means)
        return total

    def _begin_step(self, found: Losses, first: Batch, batch_idx: int) -> None:
        """Sum the counts of all batches of the step, and its tokens, over all processes."""
        assert self.model is not None
        batches, counts, number = [first], [found.counts], self._rows_seen
        for raw in rest_of_step(self.trainer, batch_idx):
            number += len(batches[-1]["index"]) * self.trainer.world_size
            batches.append(self._numbered(on_device(self, raw), number))
            counts.append(self.objective.counts(self.model, batches[-1], self.seed, self._begun_at, self.beside))
        tokens = [(batch["doc"] >= 0).sum() for batch in batches]
        each = [[c[name] for c in counts] for name in found.counts]
        sums = summed(torch.stack([torch.stack([wide(x) for x in values]).sum() for values in (*each, tokens)]))
        self._counts = dict(zip(found.counts, sums, strict=False))
        self.tokens_seen = self._tokens_learned + int(sums[-1])

    def _numbered(self, batch: Any, first: int | None = None) -> Batch:
        """The batch with all that belongs to it. Processes take rows in turn, so that numbers, and with them the noise,
        do not depend on how many there are."""
        first = self._rows_seen if first is None else first
        return as_batch(batch, first + self.global_rank, self.trainer.world_size)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:  # fmt: skip
        """By the trainer's word, where it has one, else to `Optimizer.clip_norm`."""
        learned = [weight for weight in self.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in learned if weight.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm) and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            # (With float16 a step may overflow: its scaler leaves that step out, and scales the next ones less.)
            self._stop(self._lost or f"the gradient's norm is {norm.item()}")
        limit = self.optimizer.clip_norm if gradient_clip_val is None else float(gradient_clip_val)
        if gradient_clip_algorithm == "value" and gradient_clip_val is not None and limit > 0:
            torch.nn.utils.clip_grad_value_(learned, limit)
        elif limit > 0:  # 0 is Lightning's word for none
            torch.nn.utils.clip_grads_with_norm_(learned, limit, norm)
        # A step that is not done when saving begins anew on resuming.
        self._tokens_learned, self._rows_learned = self.tokens_seen, self._rows_seen
        self.log("gradient_norm", norm)
        self.log("lr", optimizer.param_groups[0]["lr"])

    def _stop(self, what: str) -> NoReturn:
        raise NonFiniteError(
            f"{what} at step {self.global_step}; training stopped before it reached the weights, and the last "
            "checkpoint is intact. A lower lr or a longer warm-up is the usual cure."
        )

    def _losses(self, batch: Batch, seed: int) -> Losses:
        assert self.model is not None
        # Held-out figures are those of the settings that the job ends with, or they could not be compared.
        return self.objective.loss(self.model, batch, seed, self._begun_at if self.training else 1.0, self.beside)

    def _log(self, stage: str, means: Means, end: str = "") -> None:
        """Log a step's means, or those of an evaluation; all processes together."""
        bits = None if self.data is None else 1 / math.log(2) / self.data.bytes_per_token
        for name, value in self.objective.figures(means.taken(), bits).items():
            self.log(
                f"{stage}/{name}{end}", value, prog_bar=stage == "train" and name in ("ar", "diffusion"),
                add_dataloader_idx=False,
            )  # fmt: skip

    # --- Held-out data ----------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == dataloader_idx == 0:
            self._held_out = {}
        whole = self._held_out_batch(batch, batch_idx)
        self._held_out.setdefault(dataloader_idx, Means()).add(self._losses(whole, self.seed + 1))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")

    def _held_out_batch(self, batch: Any, batch_idx: int) -> Batch:
        """Numbered from 0 each time, so that figures can be compared."""
        if batch_idx == 0:
            self._held_out_rows = 0
        whole = self._numbered(batch, self._held_out_rows)
        self._held_out_rows += len(whole["index"]) * self.trainer.world_size
        return whole

    def _end_evaluation(self, stage: str) -> None:
        for number, means in self._held_out.items():
            self._log(stage, means, f"/dataloader_idx_{number}" if len(self._held_out) > 1 else "")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """The losses of each row by itself, and its text where there is a tokenizer."""
        whole = self._held_out_batch(batch, batch_idx)
        rows = []
        for place, number in enumerate(whole["index"].tolist()):
            if number == NOBODY:
                continue
            one = each(whole, itemgetter(slice(place, place + 1)))
            found = self._losses(one, self.seed + 1)
            figures = {"loss": found.total, "ar": found.ar, "diffusion": found.diffusion}
            told: dict[str, Any] = {name: float(value) for name, value in figures.items() if value is not None}
            if self.tokenizer is not None:
                ids = one["input_ids"][one["doc"] >= 0]
                told["text"] = decode(self.tokenizer, ids.tolist())
            rows.append({"row": number, "targets": int(one["target"].sum()), **told})
        return rows
