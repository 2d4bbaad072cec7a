"""A loss is a mean over the tokens of a step, and a figure one over all that it is of, however they are split."""

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from tiny_job import CONFIG
from torch import Tensor
from uneven import FIELDS, loader, rows

from hybrid.noise import Noise
from hybrid.training import Drafter, HybridTask, Objective, Optimizer

NOISE = Noise(block_sizes=(2, 4), draft_prob=0.2)
OBJECTIVES: dict[str, Objective] = {
    "joint": Objective(noise=NOISE),
    "pooled, z": Objective(noise=NOISE, denominator="pooled", z_loss=1e-2),
    "complementary": Objective(noise=Noise(block_sizes=(4,), complementary=True)),
    "padding of ends": Objective(noise=NOISE, eos_padding_weight=0.7),
    "left to right": Objective(diffusion_weight=0.0),
    "diffusion": Objective(ar_weight=0.0),
}


class Noting(HybridTask):
    """Keeps the gradient of every step, and what was logged."""

    def __init__(self, objective: Any = None, **given: Any) -> None:
        super().__init__(
            **{"config": {**CONFIG, **FIELDS, "initializer_range": 0.5}, **given}, optimizer=Optimizer(clip_norm=1e9),
            objective=objective or Objective(noise=NOISE),
        )  # fmt: skip
        self.gradients: list[list[Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.gradients.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not self.logged or name in self.logged[-1]:
            self.logged.append({})
        self.logged[-1][name] = float(value)
        super().log(name, value, *args, **kwargs)


def trainer(**given: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 1, "precision": "64-true",
            "log_every_n_steps": 1, **given,
        }
    )  # fmt: skip


def close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


class Streamed(torch.utils.data.IterableDataset[Any]):
    """A loader of it does not know its length."""

    def __iter__(self) -> Iterator[Any]:
        yield from rows()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_one_mean_whatever_its_batches(name: str) -> None:
    whole = Noting(OBJECTIVES[name])
    trainer().fit(whole, loader(6))
    (expected,) = whole.gradients
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for batch_size, accumulate, streamed in ((1, 6, False), (2, 3, False), (4, 2, False), (5, 9, True), (1, 6, True)):
        task = Noting(OBJECTIVES[name])
        trainer(accumulate_grad_batches=accumulate).fit(task, loader(batch_size, Streamed() if streamed else None))
        (found,) = task.gradients
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        ours, theirs = task.logged[-1], whole.logged[-1]
        assert ours.keys() == theirs.keys()
        assert all(close(ours[key], theirs[key]) for key in ours), (ours, theirs)


def test_a_mean_of_means_is_something_else() -> None:
    """What this file is about would be seen."""
    alone = [Noting(), Noting()]
    trainer().fit(alone[0], loader(6))
    trainer(limit_train_batches=1).fit(alone[1], loader(1))
    assert not close(alone[0].logged[-1]["train/ar"], alone[1].logged[-1]["train/ar"])


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_held_out_figures_do_not_depend_on_the_batches(stage: str) -> None:
    found = []
    for batch_size in (1, 2, 4, 6):
        task = Noting(OBJECTIVES["pooled, z"])
        (figures,) = getattr(trainer(), stage)(task, loader(batch_size), verbose=False)
        found.append(figures)
    assert found[0].keys() == found[-1].keys() >= {f"{stage[:4].replace('vali', 'val')}/ar"}
    for figures in found[1:]:
        assert all(close(figures[key], found[0][key]) for key in figures)


@pytest.mark.parametrize("slots", ["all", "reached"])
def test_a_drafters_step_is_one_mean_too(slots: Any, tmp_path: Any) -> None:
    """With "reached" the weights are known when the drafts are."""
    source = Noting()
    trainer(max_steps=1).fit(source, loader(6))
    assert source.model is not None
    source.model.save_pretrained(tmp_path)
    given: dict[str, Any] = {"config": None, "init_from": str(tmp_path)}
    found = []
    for batch_size, accumulate in ((6, 1), (2, 3)):
        task = Noting(Drafter(rank=2, slots=slots, dtype="float32", kind="ce"), **given)
        trainer(accumulate_grad_batches=accumulate, precision="32-true").fit(task, loader(batch_size))
        found.append(task)
    for ours, theirs in zip(found[0].gradients[0], found[1].gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert found[0].logged[-1] == pytest.approx(found[1].logged[-1], rel=1e-5)


def test_several_held_out_loaders_have_figures_each() -> None:
    task = Noting()
    figures = trainer().validate(task, [loader(2), loader(3)], verbose=False)
    assert close(figures[0]["val/ar/dataloader_idx_0"], figures[1]["val/ar/dataloader_idx_1"])
