"""Every argument of Lightning's Trainer means here what Lightning says, or is refused before any work."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.profilers import SimpleProfiler
from tiny_job import CONFIG
from torch import Tensor
from torch.utils.data import DataLoader
from uneven import FIELDS, loader

from hybrid.training import Batch, HybridData, HybridTask, Losses, Optimizer, SaveModel, SudokuData
from hybrid.training.text.rows import InTurn

BATCHES = 6  # of an epoch
QUIET: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False}


class Noting(HybridTask):
    """Keeps what every step and every held-out batch was of, how fast it learned, and how much."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"config": CONFIG, "optimizer": Optimizer(lr=0.01, warmup_steps=0), **given})
        self.rows: list[list[list[int]]] = []
        self.numbers: list[list[int]] = []
        self.held_out: list[tuple[int, int]] = []  # epoch and step
        self.rates: list[float] = []
        self.clipped: list[list[Tensor]] = []

    def _losses(self, batch: Batch, seed: int) -> Losses:
        if self.trainer.training:
            self.rows.append(batch["input_ids"].tolist())
            self.numbers.append(batch["index"].tolist())
        else:
            self.held_out.append((self.trainer.current_epoch, self.trainer.global_step))
        return super()._losses(batch, seed)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **given: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **given)
        self.clipped.append([p.grad.clone() for p in self.parameters() if p.grad is not None])
        self.rates.append(optimizer.param_groups[0]["lr"])

    @property
    def norm(self) -> float:
        return float(torch.nn.utils.get_total_norm(self.clipped[0]))


def data() -> SudokuData:
    return SudokuData(count=4 * BATCHES + 3, batch_size=4)


def fit(given: Any = None, task: HybridTask | None = None, **arguments: Any) -> tuple[Noting, L.Trainer]:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, "limit_val_batches": 1,
    }  # fmt: skip
    if arguments.get("barebones"):
        defaults = {"accelerator": "cpu", "max_epochs": 1}
    trainer = L.Trainer(**{**defaults, **arguments})
    task = task or Noting()
    trainer.fit(task, given or data())
    return task, trainer  # type: ignore[return-value]


# --- One for each argument ----------------------------------------------------------------------------------


def max_epochs(folder: Path) -> None:
    """It ends, each epoch validates, no sample comes twice, and the rate decays over all of it."""
    task, trainer = fit(max_epochs=3)
    assert (trainer.global_step, trainer.current_epoch) == (3 * BATCHES, 3)
    assert [n for batch in task.numbers for n in batch] == list(range(3 * BATCHES * 4))
    assert [step for _, step in task.held_out] == [BATCHES, 2 * BATCHES, 3 * BATCHES]
    assert task.rates == pytest.approx([0.01 * (1 - n / 18) for n in range(18)])
    plain, _ = fit(loader(2), Noting(config={**CONFIG, **FIELDS}), max_epochs=3)
    assert len(plain.rates) == 9 and plain.rates == pytest.approx([0.01 * (1 - n / 9) for n in range(9)])


def min_epochs(folder: Path) -> None:
    class Stops(Noting):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.should_stop = True

    assert fit(task=Stops(), max_epochs=4, min_epochs=2)[1].global_step == 2 * BATCHES


def max_steps(folder: Path) -> None:
    task, trainer = fit(max_epochs=None, max_steps=8)
    assert trainer.global_step == 8
    assert task.rates == pytest.approx([0.01 * (1 - n / 8) for n in range(8)])
    both, _ = fit(max_epochs=2, max_steps=100)
    assert both.rates[-1] == pytest.approx(0.01 / 12), "whichever ends first"


def min_steps(folder: Path) -> None:
    class Stops(Noting):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.should_stop = True

    assert fit(task=Stops(), max_epochs=4, min_steps=4)[1].global_step == BATCHES, "Lightning ends it with the epoch"


def max_time(folder: Path) -> None:
    task, trainer = fit(max_epochs=None, max_time={"seconds": 0.4})
    assert trainer.global_step > 2 and task.rates[-1] < task.rates[0]


def limit_train_batches(folder: Path) -> None:
    """An epoch is shorter, and the next one goes on."""
    task, _ = fit(limit_train_batches=2, max_epochs=3)
    assert [n for batch in task.numbers for n in batch] == list(range(24))
    assert len({tuple(row) for batch in task.rows for row in batch}) == 24
    half, _ = fit(limit_train_batches=0.5, max_epochs=2)
    assert [n for batch in half.numbers for n in batch] == list(range(24))
    assert not fit(limit_train_batches=0)[0].rows


def limit_val_batches(folder: Path) -> None:
    assert len(fit(limit_val_batches=3)[0].held_out) == 3
    assert not fit(limit_val_batches=0)[0].held_out


def limit_test_batches(folder: Path) -> None:
    task = Noting()
    L.Trainer(limit_test_batches=2, accelerator="cpu", logger=False).test(task, data(), verbose=False)
    assert len(task.held_out) == 2


def limit_predict_batches(folder: Path) -> None:
    found = L.Trainer(limit_predict_batches=2, accelerator="cpu", logger=False).predict(Noting(), data())
    assert [row["row"] for batch in found or [] for row in batch] == list(range(8))


def overfit_batches(folder: Path) -> None:
    """The same rows every epoch, with other noise."""
    task, _ = fit(overfit_batches=2, max_epochs=3)
    assert task.rows == task.rows[:2] * 3
    assert [n for batch in task.numbers for n in batch] == list(range(24))


def val_check_interval(folder: Path) -> None:
    assert [step for _, step in fit(val_check_interval=2)[0].held_out] == [2, 4, 6]
    assert [step for _, step in fit(val_check_interval=0.5)[0].held_out] == [3, 6]


def check_val_every_n_epoch(folder: Path) -> None:
    assert [step for _, step in fit(check_val_every_n_epoch=2, max_epochs=4)[0].held_out] == [12, 24]
    apart = fit(check_val_every_n_epoch=None, val_check_interval=8, max_epochs=4)[0]
    assert [step for _, step in apart.held_out] == [8, 16, 24]


def num_sanity_val_steps(folder: Path) -> None:
    task, trainer = fit(num_sanity_val_steps=2, limit_val_batches=3)
    assert [step for _, step in task.held_out] == [0, 0, 6, 6, 6]
    assert fit(limit_val_batches=3)[1].callback_metrics["val/loss"] == trainer.callback_metrics["val/loss"]


def log_every_n_steps(folder: Path) -> None:
    log = CSVLogger(folder)
    fit(logger=log, log_every_n_steps=2)
    text = Path(log.log_dir, "metrics.csv").read_text().splitlines()
    step, loss = (text[0].split(",").index(name) for name in ("step", "train/loss"))
    assert [int(line.split(",")[step]) for line in text[1:] if line.split(",")[loss]] == [1, 3, 5]


def accumulate_grad_batches(folder: Path) -> None:
    """Whole steps, and the last one of an epoch too."""
    task, trainer = fit(accumulate_grad_batches=2, max_epochs=2)
    assert trainer.global_step == 6 and task.rates == pytest.approx([0.01 * (1 - n / 6) for n in range(6)])
    task, trainer = fit(accumulate_grad_batches=4, max_epochs=2)
    assert trainer.global_step == 2 and [n for b in task.numbers for n in b] == list(range(32)), "steps are alike"
    task, trainer = fit(accumulate_grad_batches=4, limit_train_batches=3, max_epochs=2)
    assert trainer.global_step == 2 and [n for b in task.numbers for n in b] == list(range(24))


def gradient_clip_val(folder: Path) -> None:
    free = fit(gradient_clip_val=0)[0].norm
    assert fit(gradient_clip_val=free / 10)[0].norm == pytest.approx(free / 10, rel=1e-3)
    own = {"optimizer": Optimizer(clip_norm=free / 20)}
    assert fit(task=Noting(**own))[0].norm == pytest.approx(free / 20, rel=1e-3), "where the trainer says nothing"
    assert fit(task=Noting(**own), gradient_clip_val=free / 10)[0].norm == pytest.approx(free / 10, rel=1e-3)


def gradient_clip_algorithm(folder: Path) -> None:
    task, _ = fit(gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert max(float(g.abs().max()) for g in task.clipped[0]) == pytest.approx(1e-3)
    # Without a value of its own, what is cut is the norm.
    task, _ = fit(task=Noting(optimizer=Optimizer(clip_norm=1e-3)), gradient_clip_algorithm="value")
    assert task.norm == pytest.approx(1e-3, rel=1e-3)


def deterministic(folder: Path) -> None:
    try:
        one, other = fit(deterministic=True), fit(deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one[0].clipped[-1], other[0].clipped[-1], strict=True))


def benchmark(folder: Path) -> None:
    try:
        fit(benchmark=True)
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False


def inference_mode(folder: Path) -> None:
    class Looks(Noting):
        def validation_step(self, *given: Any) -> None:
            self.seen = torch.is_inference_mode_enabled()
            super().validation_step(*given)

    for on in (True, False):
        task = Looks()
        trainer = L.Trainer(accelerator="cpu", logger=False, inference_mode=on, limit_val_batches=1, **QUIET)
        trainer.validate(task, data(), verbose=False)
        assert task.seen is on
    trainer.fit_loop.max_epochs = 1
    trainer.limit_train_batches = 1
    trainer.fit(task, data())  # what was made for the evaluation can be trained


def use_distributed_sampler(folder: Path) -> None:
    """Lightning's own would shuffle what is a stream: ours is left alone, and that of others is Lightning's."""
    for asked in (True, False):
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", logger=False, use_distributed_sampler=asked
        )  # fmt: skip
        ours = data()
        ours.setup()
        ours.trainer = trainer
        for own in (ours.train_dataloader(), ours.val_dataloader()):
            assert isinstance(own.sampler, InTurn)
            assert not trainer._data_connector._requires_distributed_sampler(own)
        assert trainer._data_connector._requires_distributed_sampler(loader(2)) is asked


def sync_batchnorm(folder: Path) -> None:
    """There is no batch norm here."""
    one, other = fit(), fit(sync_batchnorm=True)
    assert all(torch.equal(a, b) for a, b in zip(one[0].clipped[-1], other[0].clipped[-1], strict=True))


def reload_dataloaders_every_n_epochs(folder: Path) -> None:
    class Counting(SudokuData):
        asked = 0

        def train_dataloader(self) -> DataLoader[Any]:
            self.asked += 1
            return super().train_dataloader()

    given = Counting(count=27, batch_size=4)
    task, _ = fit(given, reload_dataloaders_every_n_epochs=1, max_epochs=3)
    assert given.asked == 3
    assert [n for batch in task.numbers for n in batch] == list(range(3 * BATCHES * 4))


def fast_dev_run(folder: Path) -> None:
    task, trainer = fit(fast_dev_run=2, callbacks=[SaveModel(str(folder / "model"))])
    assert trainer.global_step == 2 and task.held_out
    assert list(folder.iterdir()) == [], "a trial run leaves what was trained before as it was"


def profiler(folder: Path) -> None:
    timer = SimpleProfiler()
    fit(profiler=timer)
    assert any("training_step" in name for name in timer.recorded_durations)


def detect_anomaly(folder: Path) -> None:
    fit(detect_anomaly=True)
    assert not torch.is_anomaly_enabled()


def barebones(folder: Path) -> None:
    assert fit(barebones=True, limit_val_batches=0)[1].global_step == BATCHES


def plugins(folder: Path) -> None:
    """One that writes checkpoints would stand in the way of ours."""
    given = {"callbacks": [SaveModel(str(folder / "model"))], "plugins": [AsyncCheckpointIO()]}
    task = Noting()
    with pytest.raises(ValueError, match="AsyncCheckpointIO writes checkpoints, and so does SaveModel"):
        fit(task=task, **given)
    assert not task.rows
    fit(plugins=[AsyncCheckpointIO()], default_root_dir=folder)


def logger(folder: Path) -> None:
    _, trainer = fit(logger=True, default_root_dir=folder, log_every_n_steps=1)
    (file,) = folder.rglob("metrics.csv")
    assert "train/ar" in file.read_text() and trainer.log_dir is not None


def callbacks(folder: Path) -> None:
    """Those that watch a figure, as everywhere."""
    stop = L.callbacks.EarlyStopping("val/loss", patience=0, min_delta=1e9)
    keep = L.callbacks.ModelCheckpoint(folder, monitor="val/loss", save_top_k=1)
    rate = L.callbacks.LearningRateMonitor()
    _, trainer = fit(
        callbacks=[stop, keep, rate], max_epochs=9, enable_checkpointing=True, logger=CSVLogger(folder / "log")
    )  # fmt: skip
    assert trainer.current_epoch == 2 and len(list(folder.glob("*.ckpt"))) == 1


def enable_checkpointing(folder: Path) -> None:
    """Lightning's own checkpoints can be gone on with."""
    fit(enable_checkpointing=True, default_root_dir=folder)
    (file,) = folder.rglob("*.ckpt")
    task, again = Noting(), L.Trainer(accelerator="cpu", logger=False, max_epochs=2, limit_val_batches=0, **QUIET)
    again.fit(task, data(), ckpt_path=file, weights_only=True)
    assert [n for batch in task.numbers for n in batch] == list(range(24, 48))


def enable_progress_bar(folder: Path) -> None:
    assert fit(enable_progress_bar=True)[1].progress_bar_metrics["train/ar"] > 0


def enable_model_summary(folder: Path) -> None:
    fit(enable_model_summary=True)


def default_root_dir(folder: Path) -> None:
    assert fit(default_root_dir=folder)[1].default_root_dir == str(folder)


def enable_autolog_hparams(folder: Path) -> None:
    for on in (True, False):
        fit(logger=CSVLogger(folder / str(on)), enable_autolog_hparams=on)
        assert any("max_position_embeddings" in file.read_text() for file in (folder / str(on)).rglob("*.yaml")) is on


ARGUMENTS: list[Callable[[Path], None]] = [
    max_epochs, min_epochs, max_steps, min_steps, max_time, limit_train_batches, limit_val_batches, limit_test_batches,
    limit_predict_batches, overfit_batches, val_check_interval, check_val_every_n_epoch, num_sanity_val_steps,
    log_every_n_steps, accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm, deterministic, benchmark,
    inference_mode, use_distributed_sampler, sync_batchnorm, reload_dataloaders_every_n_epochs, fast_dev_run, profiler,
    detect_anomaly, barebones, plugins, logger, callbacks, enable_checkpointing, enable_progress_bar,
    enable_model_summary, default_root_dir, enable_autolog_hparams,
]  # fmt: skip
ELSEWHERE = {
    "accelerator": "test_recipes.py", "devices": "test_several.py", "num_nodes": "test_recipes.py",
    "strategy": "test_several.py", "precision": "test_precision.py",
    "model_registry": "a service of Lightning's own, which asks nothing of the task",
}  # fmt: skip


@pytest.mark.parametrize("argument", ARGUMENTS, ids=lambda argument: argument.__name__)
def test_an_argument_means_what_lightning_says(
    argument: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argument(tmp_path)


def test_no_argument_is_left_out() -> None:
    known = {argument.__name__ for argument in ARGUMENTS} | ELSEWHERE.keys()
    assert known == set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}


def test_the_data_are_those_of_a_job_that_is_asked_twice() -> None:
    """A second trainer begins anew with the same data."""
    given: HybridData = data()
    assert fit(given)[0].numbers == fit(given)[0].numbers
