"""Whatever is not finite, wherever it arises, never reaches the weights."""

from itertools import product
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from tiny_job import CONFIG, with_loss
from torch import Tensor

from hybrid.training.batch import Batch
from hybrid.training.data import SudokuData
from hybrid.training.module import HybridTask
from hybrid.training.step import NonFiniteError

# Steps begin with 0; of each step's three batches, the one with this number.
INJECTIONS = [
    (*what, *when)
    for what, when in product(
        [*product(["loss", "gradient"], ["nan", "inf"]), ("logits", "nan"), ("logits", "-inf")],
        [(0, 0, 1, "32-true"), (2, 0, 1, "bf16-mixed"), (1, 1, 3, "32-true"), (2, 2, 3, "bf16-mixed")],
    )
]


class Poisoned(HybridTask):
    """Puts one value that is not finite where and when it is told, and notes the weights before each step."""

    def __init__(self, where: str, value: float, at: int, accumulate: int) -> None:
        super().__init__(CONFIG)
        self.where, self.value, self.at, self.accumulate = where, value, at, accumulate

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.model is not None
        if batch_idx % self.accumulate == 0:
            self.before = {name: weight.clone() for name, weight in self.state_dict().items()}
        hooks: list[Any] = []
        if batch_idx == self.at and self.where == "logits":
            hooks.append(self.model.lm_head.register_forward_hook(self._in_one_row))
        if batch_idx == self.at and self.where == "gradient":
            norm = self.model.model.layers[0].input_layernorm.weight
            self.hook = norm.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), self.value))
        loss = super().training_step(batch, batch_idx)
        for hook in hooks:
            hook.remove()
        return loss

    def _losses(self, batch: Batch, seed: int) -> Any:
        found = super()._losses(batch, seed)
        if self.where == "loss" and self.trainer.fit_loop.batch_idx == self.at:
            return with_loss(found, self.value)
        return found

    def _in_one_row(self, module: Any, given: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(0, torch.tensor([0]), self.value)


@pytest.mark.parametrize(("where", "value", "step", "batch", "accumulate", "precision"), INJECTIONS)
def test_one_value_that_is_not_finite_stops_the_job_before_the_weights(
    where: str, value: str, step: int, batch: int, accumulate: int, precision: Any
) -> None:
    trainer = L.Trainer(
        max_steps=5, accelerator="cpu", accumulate_grad_batches=accumulate, precision=precision, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1000,
    )  # fmt: skip
    task = Poisoned(where, float(value), step * accumulate + batch, accumulate)
    said = "the gradient's norm is (nan|inf)" if where == "gradient" else "the loss is -?(nan|inf)"
    with pytest.raises(NonFiniteError, match=rf"{said} at step {step};"):
        trainer.fit(task, SudokuData(count=80, batch_size=4))
    assert trainer.global_step == step
    assert all(torch.equal(weight, task.before[name]) for name, weight in task.state_dict().items())
    assert all(weight.isfinite().all() for weight in task.parameters())
