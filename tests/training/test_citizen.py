"""What Lightning's users do beside `fit`: load checkpoints, tune, log, and bring parts of their own."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch import loggers
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.tuner import Tuner
from oracles import tiny
from own_parts import Focal, late, ones
from tiny_job import CONFIG
from torch import Tensor
from uneven import FIELDS, loader
from wandb_file import settings

import hybrid.training
from hybrid import HybridForCausalLM
from hybrid.commands.recipes import clip
from hybrid.training import (
    GRPO,
    Curriculum,
    Drafter,
    HybridTask,
    LoRA,
    LossByNoise,
    Losses,
    Noise,
    Objective,
    Optimizer,
    SampleModes,
    SaveModel,
    SudokuData,
    losses,
)
from hybrid.training.cli import HybridCLI
from hybrid.training.laboratory.speed import run_job
from hybrid.training.running.settings import plain, revived
from hybrid.training.watching.showing import show_table

WHOLE = {**CONFIG, **FIELDS}


def trainer(**given: Any) -> L.Trainer:
    return L.Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
           "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0, **given}
    )  # fmt: skip


# --- Settings and checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Objective(noise=Noise(block_sizes=(2, 8), t_range=(0.1, 0.9)), curriculum=Curriculum(stable=4)), Optimizer(),
        LoRA(targets=("q_proj",)), Drafter(block_sizes=(4,)), GRPO(reward="countdown", inner_steps=2),
        {"a": [1, 2.5, None, "x"], "b": True},
    ],
)  # fmt: skip
def test_settings_are_plain_values_and_come_back(value: Any) -> None:
    assert revived(json.loads(json.dumps(plain(value)))) == value


def test_what_was_saved_before_a_module_moved_comes_back() -> None:
    for was, now in (("hybrid.training.drafter", Drafter()), ("hybrid.training.curriculum", Curriculum(stable=4))):
        old = plain(now) | {"class_path": f"{was}.{type(now).__name__}"}
        assert revived(old) == now


def test_a_file_cannot_name_what_is_run() -> None:
    for kind in ("os.system", "hybrid.training.cli.HybridCLI", "hybrid.checkpoints.convert.convert", "own_parts.Focal"):
        with pytest.raises(ValueError, match="is not of this library"):
            revived({"class_path": kind, "init_args": {"command": "ls"}})
    for value, name in ((Noise(schedule=late), "late"), (GRPO(reward=ones), "ones"), (GRPO(reward="os.system"), "os")):
        with pytest.raises(ValueError, match=f"{name}.* is not of this library"):
            revived(plain(value))


KINDS: dict[str, dict[str, Any]] = {
    "joint": {"objective": Objective(noise=Noise(block_sizes=(2, 4)), ar_first=0.5), "seed": 3},
    "low rank": {"lora": LoRA(rank=2), "optimizer": Optimizer(lr=0.01)},
    "memory": {"gradient_checkpointing": True},
    "own": {"objective": Focal(2.0)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["SaveModel", "ModelCheckpoint"])
def test_a_task_loads_from_any_checkpoint(kind: str, how: str, tmp_path: Path) -> None:
    task = HybridTask(config=WHOLE, **KINDS[kind])
    saver = {"SaveModel": SaveModel(str(tmp_path / "model")), "ModelCheckpoint": ModelCheckpoint(tmp_path)}[how]
    trainer(callbacks=[saver], enable_checkpointing=how == "ModelCheckpoint").fit(task, loader(3))
    (file,) = tmp_path.glob("*.ckpt")
    own = {"objective": Focal(2.0)} if kind == "own" else {}
    if own:
        with pytest.raises(ValueError, match=r"Focal is not of this library.*pass it by its name"):
            HybridTask.load_from_checkpoint(file)
    found = HybridTask.load_from_checkpoint(file, **own)
    assert found.state_dict().keys() == task.state_dict().keys()
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in found.state_dict().items())
    assert (found.optimizer, found.lora, found.seed) == (task.optimizer, task.lora, task.seed)
    assert own or found.objective == task.objective
    assert found.tokens_seen == task.tokens_seen > 0
    one, other = (trainer(limit_val_batches=9).validate(x, loader(3), verbose=False) for x in (task, found))
    assert one == other
    assert HybridTask.load_from_checkpoint(file, **{"optimizer": Optimizer(lr=0.5), **own}).lr == 0.5


def test_a_drafter_loads_beside_its_model(tmp_path: Path) -> None:
    tiny(0, dtype=torch.float32, max_position_embeddings=64, vocab_size=24).save_pretrained(tmp_path / "model")
    task = HybridTask(init_from=str(tmp_path / "model"), objective=Drafter(rank=2, dtype="float32"))
    trainer(callbacks=[SaveModel(str(tmp_path / "drafter"))]).fit(task, loader(3))
    found = HybridTask.load_from_checkpoint(tmp_path / "drafter.ckpt")
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in found.state_dict().items())


def test_what_is_no_checkpoint_of_a_task_is_said(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "loops": {}, "pytorch-lightning_version": "2"}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="does not say what model it is of"):
        HybridTask.load_from_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        HybridTask.load_from_checkpoint(tmp_path / "missing.ckpt")


# --- Tuners and loggers -------------------------------------------------------------------------------------


def test_the_tuner_finds_a_rate_and_leaves_the_job_as_it_was(tmp_path: Path) -> None:
    task, data = HybridTask(config=CONFIG), SudokuData(count=120, batch_size=4)
    run = trainer(max_epochs=2, default_root_dir=tmp_path)
    found = Tuner(run).lr_find(task, data, num_training=20, min_lr=1e-5, max_lr=1e-1, update_attr=True)
    assert found is not None and len(found.results["loss"]) >= 20 and not list(tmp_path.glob("*.ckpt"))
    assert task.lr == task.optimizer.lr == found.suggestion() != Optimizer().lr
    assert run.global_step == 0 and task.tokens_seen == 0
    run.fit(task, data)
    assert run.global_step == 60


def test_the_rate_finder_works_as_a_callback(tmp_path: Path) -> None:
    task = HybridTask(config=WHOLE)
    finder = LearningRateFinder(num_training_steps=20)
    trainer(callbacks=[finder], default_root_dir=tmp_path, max_epochs=4).fit(task, loader(1))
    assert finder.optimal_lr is not None


def test_the_tuner_finds_a_batch_size(tmp_path: Path) -> None:
    task, data = HybridTask(config=CONFIG), SudokuData(count=80, batch_size=2)
    run = trainer(default_root_dir=tmp_path)
    assert Tuner(run).scale_batch_size(task, data, max_trials=3, steps_per_trial=2) == data.batch_size == 8
    run.fit(task, data)
    assert run.global_step == 10 and task.tokens_seen == 80 * 34


def test_ones_own_wandb_logger_knows_the_settings(tmp_path: Path) -> None:
    log = WandbLogger(save_dir=tmp_path, offline=True)
    trainer(logger=log, log_every_n_steps=1).fit(HybridTask(config=WHOLE, seed=7), loader(3))
    log.experiment.finish()
    (file,) = tmp_path.rglob("*.wandb")
    found = settings(file)
    assert found["seed"] == 7 and found["config"]["hidden_size"] == CONFIG["hidden_size"]
    assert found["objective"]["init_args"]["diffusion_weight"] == 0.3


# --- Parts of one's own -------------------------------------------------------------------------------------


def test_an_objective_of_ones_own_is_an_argument() -> None:
    task = HybridTask(config=WHOLE, objective=Focal(), optimizer=Optimizer(lr=0.01))
    run = trainer(max_epochs=20, accumulate_grad_batches=2)
    run.fit(task, loader(2))
    assert run.callback_metrics["train/perplexity"] == pytest.approx(math.exp(run.callback_metrics["train/ar"]))
    fresh = HybridTask(config=WHOLE, objective=Focal())
    before, after = (trainer(limit_val_batches=9).validate(x, loader(2), verbose=False)[0] for x in (fresh, task))
    assert after["val/ar"] < before["val/ar"] - 0.2


def test_parts_of_ones_own_are_class_paths_in_a_recipe(tmp_path: Path) -> None:
    words = [
        "fit", "--out", str(tmp_path / "model"), "--config", str(tmp_path / "recipe.yaml"), "--trainer.max_steps=2",
        "--trainer.accelerator=cpu", "--data=hybrid.training.data.SudokuData", "--data.count=20", "--data.batch_size=4",
    ]  # fmt: skip
    recipe: dict[str, Any] = {"model": {"config": CONFIG}}
    recipe["model"]["objective"] = {"class_path": "own_parts.Focal", "init_args": {"power": 2.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cli = HybridCLI.run([*words, "--model.objective.power=3"])
    assert cli.model.objective.power == 3 and "train/perplexity" in cli.trainer.callback_metrics
    recipe["model"]["objective"] = {"noise": {"schedule": "own_parts.late"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert HybridCLI.run(words).model.last_losses.masked_t is not None


def test_a_schedule_of_ones_own_decides_the_masks() -> None:
    """As many are masked as it says, and the bound of a uniform model is the same whatever it says."""
    model = tiny(0, vocab_size=24)
    for p in model.parameters():
        p.data.zero_()  # every token is as likely as another
    ids = torch.randint(0, 23, (400, 32), generator=torch.Generator().manual_seed(1))
    for schedule in (late, "linear", "cosine"):
        found = of_schedule(model, ids, schedule)
        assert float(found.total) == pytest.approx(math.log(23), rel=0.05)
    found = of_schedule(model, ids, late)
    assert found.masked_t is not None and len(found.masked_t) / ids.numel() == pytest.approx(1 / 3, abs=0.02)


def of_schedule(model: HybridForCausalLM, ids: Tensor, schedule: Any) -> Losses:
    noise = Noise(schedule=schedule, seed_clean=False, canvas_prob=0.0)
    return losses(model, ids, Objective(ar_weight=0.0, diffusion_weight=1.0, noise=noise))


@pytest.mark.parametrize("name", ["sideways", "torch.no_such_thing", "nowhere.late", "math.pi"])
def test_a_schedule_that_is_not_there_is_said(name: str) -> None:
    with pytest.raises(ValueError, match=f"schedule is '{name}'"):
        Noise(schedule=name).check(tiny(0).config, 32)


def test_what_needs_the_joint_objective_says_so() -> None:
    drafter = Path(hybrid.training.__path__[0], "recipes", "drafter.yaml")
    with pytest.raises(ValueError, match=r"drafter\.yaml learns Drafter"):
        run_job(drafter, 1)
    with pytest.raises(ValueError, match=r"drafter\.yaml learns Drafter"):
        clip(config=drafter)


@pytest.mark.parametrize("kind", ["TensorBoardLogger", "MLFlowLogger"])
def test_other_loggers_have_every_step_the_settings_pictures_and_texts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # no server, no database
    pytest.importorskip({"TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}[kind])
    log: Any = getattr(loggers, kind)(
        **({"save_dir": tmp_path} if kind == "TensorBoardLogger" else {"tracking_uri": f"file:{tmp_path}/runs"})
    )
    task = HybridTask(config=CONFIG, objective=Objective(noise=Noise(block_sizes=(4,))), seed=7)
    watching = [LossByNoise(), SampleModes(every=3, count=1, max_new_tokens=4)]
    trainer(logger=log, log_every_n_steps=1, callbacks=watching).fit(task, SudokuData(count=24, batch_size=4))
    if kind == "TensorBoardLogger":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(log.log_dir, size_guidance={"tensors": 0})
        found.Reload()
        assert [x.step for x in found.Scalars("train/loss")] == list(range(6))
        assert found.Tags()["images"] == ["loss_by_noise"] and "samples/texts/text_summary" in found.Tags()["tensors"]
        assert "diffusion_weight" in (Path(log.log_dir) / "hparams.yaml").read_text()
    else:
        client, run_id = log.experiment, log.run_id
        assert [x.step for x in client.get_metric_history(run_id, "train/loss")] == list(range(6))
        assert client.get_run(run_id).data.params["seed"] == "7"
        assert "loss_by_noise.png" in [x.path for x in client.list_artifacts(run_id)]


def test_a_table_of_text_keeps_its_cells_apart() -> None:
    told: list[Any] = []
    log = SimpleNamespace(add_text=lambda *given: told.append(given))
    board = loggers.TensorBoardLogger.__new__(loggers.TensorBoardLogger)
    board._experiment = log  # type: ignore[assignment]
    show_table(board, "texts", ["a", "b"], [["x|y\nz", 0.5], [None, 3]], 4)
    assert told == [("texts", "| a | b |\n| --- | --- |\n| x\\|y⏎z | 0.500 |\n|  | 3 |", 4)]
