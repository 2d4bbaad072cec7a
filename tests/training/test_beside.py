"""The commands beside `fit` score what was trained, and touch nothing that it left; what cannot be written is found out
before it is trained."""

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import wandb
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from oracles import tiny
from tiny_job import CONFIG
from wandb_file import history, records, whole_history

import hybrid.training.watching.noise_picture
from hybrid.common.files import SaveError
from hybrid.training import HybridTask, SaveModel, SudokuData
from hybrid.training.cli import HybridCLI
from hybrid.training.running.checkpoint import read_checkpoint
from hybrid.training.text.tokenizing import character_tokenizer
from hybrid.training.watching.csv_log import CSVLog
from hybrid.training.watching.wandb_log import WandbLog


def untrained(folder: Path) -> None:
    tokenizer = character_tokenizer("1234.=")
    fields = {"max_position_embeddings": 64, "vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    tiny(0, **fields).save_pretrained(folder)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """One that begins with a checkpoint."""
    untrained(tmp_path / "begun")
    said = {
        "out": str(tmp_path / "runs/model"),
        "model": {"init_from": str(tmp_path / "begun"), "optimizer": {"lr": 0.02, "warmup_steps": 0, "decay": "none"}},
        "data": {"class_path": "hybrid.training.data.SudokuData", "init_args": {"count": 40, "batch_size": 8}},
        "trainer": {
            "max_epochs": 6, "accelerator": "cpu", "limit_val_batches": 2, "limit_test_batches": 2,
            "limit_predict_batches": 1, "log_every_n_steps": 1,
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(said))
    return tmp_path / "recipe.yaml"


def run(what: str, recipe: Path, *more: str) -> HybridCLI:
    return HybridCLI.run([what, "--config", str(recipe), *more])


def trainer_with(saver: SaveModel) -> Callable[[], None]:
    task, data = HybridTask(config=CONFIG), SudokuData(count=20, batch_size=4)
    trainer = L.Trainer(max_steps=1, callbacks=[saver], accelerator="cpu", logger=False, enable_checkpointing=False)
    return lambda: trainer.fit(task, data)


def files(folder: Path) -> dict[str, str]:
    return {
        str(x.relative_to(folder)): hashlib.sha256(x.read_bytes()).hexdigest() for x in folder.rglob("*") if x.is_file()
    }


@pytest.mark.parametrize("low_rank", [False, True])
def test_what_was_trained_is_scored_and_nothing_of_it_changes(
    recipe: Path, low_rank: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = hybrid.training.watching.noise_picture
    monkeypatch.setattr(pictures, "noise_picture", lambda curves, path: path.write_bytes(b""))
    more = ["--model.lora.rank=4"] if low_rank else []
    begun = float(run("validate", recipe, *more).trainer.callback_metrics["val/loss"])
    assert "begun as it is" in capsys.readouterr().err
    trained = float(run("fit", recipe, *more).trainer.callback_metrics["val/loss"])
    assert trained < begun - 0.3
    before = files(tmp_path)
    again = run("validate", recipe, *more).trainer.callback_metrics["val/loss"]
    assert float(again) == pytest.approx(trained, rel=1e-6)
    assert "what was trained, " in capsys.readouterr().err
    assert run("test", recipe, *more).trainer.callback_metrics["test/loss"] < begun - 0.3
    assert files(tmp_path) == before
    run("predict", recipe, *more)
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"runs/model-predictions.jsonl"}


def test_a_checkpoint_from_another_beginning_is_not_what_was_trained(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = float(run("validate", recipe).trainer.callback_metrics["val/loss"])
    run("fit", recipe)
    untrained(tmp_path / "other")
    found = run("validate", recipe, f"--model.init_from={tmp_path / 'other'}")
    assert float(found.trainer.callback_metrics["val/loss"]) == pytest.approx(begun)
    assert "other as it is" in capsys.readouterr().err


def test_a_resumed_job_goes_on_in_the_same_wandb_run(recipe: Path, tmp_path: Path) -> None:
    """Stopped, gone on with, killed after it logged more than it saved, and gone on with at another learning rate: the
    run has each step once, and the CSV log's figures."""
    state = tmp_path / "runs/model.ckpt"

    def part(steps: int, *more: str) -> None:
        run("fit", recipe, "--wandb=offline", f"--trainer.max_steps={steps}", *more).trainer.loggers[1].finish()

    part(5)
    part(8, f"--ckpt_path={state}")
    early = state.read_bytes()
    part(12, f"--ckpt_path={state}")
    state.write_bytes(early)
    part(15, f"--ckpt_path={state}", "--model.optimizer.lr=0.001")
    files = sorted((tmp_path / "runs/wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 4
    ids = {r.run.run_id for file in files for r in records(file) if r.WhichOneof("record_type") == "run"}
    assert len(ids) == 1
    with (tmp_path / "runs/logs/model/metrics.csv").open() as lines:
        rows = [(int(row["step"]), row) for row in csv.DictReader(lines)]
    calls = [(int(call["trainer/global_step"]), call) for call in whole_history(files)]
    for name in ("train/loss", "lr", "val/loss"):
        table = {step: float(row[name]) for step, row in rows if row[name]}
        sent = [(step, call[name]) for step, call in calls if name in call]
        assert [step for step, _ in sent] == sorted(table) and dict(sent) == pytest.approx(table, rel=1e-6)
    assert len([call for _, call in calls if "train/loss" in call]) == 15


def test_a_service_that_does_not_rewind_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Then the same steps, logged again, are left out, and it is told once."""
    begin, asked = wandb.init, list[Any]()

    def refusing(**given: Any) -> Any:
        asked.append(given.get("resume_from"))
        if given.get("resume_from"):
            raise wandb.errors.CommError("rewinding is not for this account")
        return begin(**given)

    monkeypatch.setattr(wandb, "init", refusing)
    log = WandbLog(tmp_path, "model", "offline", id="abc", rows=7, cut=True)
    log.rewind(9)
    with pytest.warns(RuntimeWarning, match="did not rewind the run .rewinding is not for this account"):
        for step in range(7, 12):
            log.log_metrics({"x": float(step)}, step)
    log.finish()
    assert asked == ["abc?_step=6", None]
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [call["x"] for call in history(file)] == [10.0, 11.0]


@pytest.mark.parametrize("kind", ["a file above", "a file in its place", "a folder for the checkpoint"])
def test_what_cannot_be_written_is_found_out_before_the_first_step(kind: str, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "there" / "model"
    if kind == "a file above":
        out.parent.write_text("")
    else:
        out.parent.mkdir()
        (out.write_text("") if kind == "a file in its place" else (out.parent / "model.ckpt").mkdir())
    with pytest.raises(SaveError, match=r"there/model.* could not be written"):
        run("fit", recipe, "--out", str(out))
    fit_in_python = trainer_with(SaveModel(str(out)))
    with pytest.raises(SaveError, match=r"there/model.* could not be written"):
        fit_in_python()


def test_a_probe_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    run("fit", recipe, "--trainer.max_steps=1")
    assert not [name for name in files(tmp_path / "runs") if "probe" in name]
    assert read_checkpoint(tmp_path / "runs/model.ckpt")["global_step"] == 1


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CSVLog(tmp_path, "model")
    log.log_metrics({"a": 1.0}, 0)
    log.save()

    def full(self: Path, *given: Any, **more: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    log.log_metrics({"a": 2.0}, 1)
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.csv"):
        log.save()


def test_config_is_the_recipes(recipe: Path, tmp_path: Path) -> None:
    """(`CONFIG` is what other jobs here begin with.)"""
    run("fit", recipe, "--trainer.max_steps=1", "--model.init_from=null", f"--model.config={CONFIG}")
    kept = yaml.safe_load((tmp_path / "runs/logs/model/config.yaml").read_text())
    assert kept["model"]["config"]["hidden_size"] == CONFIG["hidden_size"]
    run("validate", recipe, "--model.init_from=null", f"--model.config={CONFIG}", "--trainer.limit_val_batches=1")
    assert yaml.safe_load((tmp_path / "runs/logs/model/config.yaml").read_text()) == kept


def test_a_job_goes_on_from_what_lightnings_own_callback_saved(tmp_path: Path) -> None:
    """`SaveModel` finds nothing of its own in there."""
    given: dict[str, Any] = {"accelerator": "cpu", "logger": False, "limit_val_batches": 0}
    keeps = ModelCheckpoint(tmp_path, filename="theirs", every_n_train_steps=2)
    first = L.Trainer(max_steps=2, callbacks=[keeps], **given)
    first.fit(HybridTask(config=CONFIG), SudokuData(count=20, batch_size=4))
    saver = SaveModel(str(tmp_path / "model"))
    trainer = L.Trainer(max_steps=3, callbacks=[saver], enable_checkpointing=False, **given)
    trainer.fit(HybridTask(config=CONFIG), SudokuData(count=20, batch_size=4), ckpt_path=tmp_path / "theirs.ckpt")
    assert trainer.global_step == read_checkpoint(tmp_path / "model.ckpt")["global_step"] == 3


def test_time_between_two_savings_is_not_negative() -> None:
    with pytest.raises(ValueError, match="minutes is -1; it must not be negative"):
        SaveModel(minutes=-1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--wandb=offline", "--trainer.logger=false"], "wandb: the recipe's trainer.logger takes its place"),
        (["--wandb_artifact=true"], "wandb_artifact: no run keeps the model"),
    ],
)
def test_what_nothing_comes_of_is_said(words: list[str], said: str, recipe: Path) -> None:
    with pytest.warns(UserWarning, match=said):
        run("fit", recipe, "--trainer.max_steps=1", *words)


def test_a_recipe_is_not_written_over(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning writes all settings to `config.yaml`, where there is no log into the folder that one is in."""
    monkeypatch.chdir(recipe.parent)
    mine = recipe.rename("config.yaml")
    before = mine.read_bytes()
    run("fit", mine, "--trainer.max_steps=1", "--trainer.logger=false")
    assert mine.read_bytes() == before
    run("fit", mine, "--trainer.max_steps=1")
    assert mine.read_bytes() == before and Path("runs/logs/model/config.yaml").exists()
