"""What wandb gets is what the CSV log has; and nothing that happens to wandb ends a job."""

import csv
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from PIL import Image
from tiny_job import CONFIG
from wandb_file import artifacts, history, settings

import hybrid.training.job
import hybrid.training.watching.noise_picture
from hybrid import HybridForCausalLM
from hybrid.training.cli import HybridCLI
from hybrid.training.data import SudokuData
from hybrid.training.job import fit, loggers
from hybrid.training.module import HybridTask
from hybrid.training.watching.samples import COLUMNS
from hybrid.training.watching.wandb_log import PATIENCE, WandbLog

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def off_the_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is tested must keep wandb off the network, not the environment of the tests."""
    # The picture of `run` is looked at; what the other jobs send is a dot.
    dot = Image.new("L", (1, 1))
    monkeypatch.setattr(hybrid.training.watching.noise_picture, "noise_picture", lambda curves, path: dot.save(path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.finish()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of the command line with all that can be logged; its folder."""
    folder = tmp_path_factory.mktemp("tracked")
    recipe = Path(hybrid.training.job.__file__).parent / "recipes" / "sudoku.yaml"
    small = [f"--model.config.{name}={value}" for name, value in CONFIG.items()]
    silent = pytest.MonkeyPatch()
    silent.delenv("WANDB_MODE", raising=False)
    silent.setenv("WANDB_BASE_URL", NOBODY)
    silent.setenv("WANDB_SILENT", "true")
    HybridCLI.run(
        ["fit", "--config", str(recipe), "--out", str(folder / "model"), "--wandb=offline", "--wandb_artifact=true",
         "--trainer.max_steps=6", "--trainer.accelerator=cpu", "--trainer.precision=32-true",
         "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=3", "--trainer.limit_val_batches=1",
         "--data.init_args.batch_size=4", "--data.init_args.count=20", *small]
    )  # fmt: skip
    wandb.finish()
    silent.undo()
    return folder


def file_of(folder: Path) -> Path:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "model" / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_every_figure_of_the_csv_log_is_in_wandb_and_the_other_way_round(run: Path) -> None:
    def known(step: int, values: dict[str, Any]) -> dict[tuple[int, str], float]:
        return {
            (step, name): float(value)
            for name, value in values.items()
            if name not in ("step", "trainer/global_step", "epoch") and not name.startswith("_") and value != ""
            and not isinstance(value, dict)
        }  # fmt: skip

    table: dict[tuple[int, str], float] = {}
    for row in csv_rows(run):
        table |= known(int(row["step"]), row)
    sent: dict[tuple[int, str], float] = {}
    for call in history(file_of(run)):
        sent |= known(call["trainer/global_step"], call)
    assert sent.keys() == table.keys()
    assert sent == pytest.approx(table, rel=1e-6)
    names = {name for _, name in table}
    assert names >= {
        "train/ar", "train/diffusion", "train/ar_bits_per_byte", "train/diffusion_bits_per_byte",
        "val/ar_bits_per_byte", "train/masked_accuracy", "gradient_norm", "lr", "tokens", "tokens_per_second", "mfu",
        "samples/acceptance", "samples/tokens_per_forward_block",
    }  # fmt: skip
    assert any(name.startswith("loss_at_t/") for name in names)


def test_the_table_of_samples_is_that_of_the_file(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "logs" / "model" / "samples.jsonl").read_text().splitlines()]
    (place,) = [call["samples/texts"] for call in history(file_of(run)) if "samples/texts" in call]
    table = json.loads((file_of(run).parent / "files" / place["path"]).read_text())
    assert table["columns"] == list(COLUMNS)
    assert table["data"] == [[line[name] for name in COLUMNS] for line in lines]
    assert {line["mode"] for line in lines} == {"ar", "block", "diffusion", "speculative"}


def test_the_picture_is_the_one_in_the_folder(run: Path) -> None:
    (place,) = [call["loss_by_noise"] for call in history(file_of(run)) if "loss_by_noise" in call]
    (name,) = place["filenames"]
    sent = (file_of(run).parent / "files" / name).read_bytes()
    assert sent == (run / "logs" / "model" / "loss_by_noise.png").read_bytes()
    assert sent[:4] == b"\x89PNG"


def test_the_model_is_kept_as_an_artifact(run: Path) -> None:
    (model,) = [artifact for artifact in artifacts(file_of(run)) if artifact.type == "model"]
    entries = {entry.path: Path(entry.local_path) for entry in model.manifest.contents}
    assert entries.keys() == {path.name for path in (run / "model").iterdir()} >= {"model.safetensors", "config.json"}
    for name, copy in entries.items():
        assert copy.read_bytes() == (run / "model" / name).read_bytes()


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return value


def test_the_settings_are_shown(run: Path) -> None:
    found = settings(file_of(run))
    saved = yaml.safe_load((run / "logs" / "model" / "config.yaml").read_text())
    for part in ("model", "data", "out"):
        assert without_none(found[part]) == without_none(saved[part])
    assert found["model"]["config"]["hidden_size"] == CONFIG["hidden_size"]
    assert found["trainer"]["max_steps"] == 6


def small_job(folder: Path, mode: Any, name: str = "model") -> None:
    class Short(HybridTask):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.should_stop = self.global_step == 6

    fit(Short(CONFIG), SudokuData(count=20, batch_size=4), folder / name, minutes=1, wandb=mode)


def check_whole(folder: Path) -> None:
    """The job is done, and its log is there."""
    assert [int(row["step"]) for row in csv_rows(folder)] == [4, 5]
    HybridForCausalLM.from_pretrained(folder / "model")


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "wandb" in str(w.message) and w.category in (RuntimeWarning, UserWarning)]


def test_jobs_from_python_are_runs_of_their_own_and_show_their_settings(tmp_path: Path) -> None:
    """`hybrid quickstart --wandb offline` trains two models in one process."""
    for name in ("one", "two"):
        small_job(tmp_path, "offline", name)
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    for file in files:
        found = settings(file)
        kept = {name: found[name]["init_args"] for name in ("objective", "optimizer")}
        assert kept["objective"]["diffusion_weight"] == 0.3 and kept["optimizer"]["lr"] == 1e-3
        assert sum("train/diffusion" in call for call in history(file)) == 2
        assert not any(artifact.type == "model" for artifact in artifacts(file)), "it was not asked for"
    assert os.environ.get("WANDB_MODE") is None, "a later run of this process may be online"


def test_a_service_that_cannot_be_reached_makes_the_run_an_offline_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setitem(PATIENCE, "init_timeout", 2.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small_job(tmp_path, "online")
    (said,) = warned(caught)
    assert "could not be reached" in said and "wandb sync" in said
    check_whole(tmp_path)
    assert str(file_of(tmp_path).parent) in said
    logged = {name for call in history(file_of(tmp_path)) for name in call}
    assert "train/diffusion" in logged


@pytest.mark.parametrize("missing", ["module", "package"])
def test_without_wandb_a_job_goes_on(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "module":  # a broken installation
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small_job(tmp_path, "offline")
    assert len(warned(caught)) == 1
    check_whole(tmp_path)


DYING = """
import os, signal, sys
from pathlib import Path
from hybrid.training.data import SudokuData
from hybrid.training.job import fit
from hybrid.training.module import HybridTask
from tiny_job import CONFIG

def services():
    # of wandb, below this process
    parent, name = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            said, fields = status.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        number = int(status.parent.name)
        parent[number], name[number] = int(fields.split()[1]), said
    for number in parent:
        above = number
        while above in parent and above != os.getpid():
            above = parent[above]
        if above == os.getpid() and "wandb" in name[number]:
            yield number

class Fatal(HybridTask):
    def on_train_batch_end(self, *args):
        self.trainer.should_stop = self.global_step == 6
        if self.global_step == 2:
            found = list(services())
            assert found
            for service in found:
                os.kill(service, signal.SIGKILL)

fit(Fatal(CONFIG), SudokuData(count=20, batch_size=4), Path(sys.argv[1]) / "model", minutes=1, wandb="offline")
"""


@pytest.mark.slow
def test_a_service_that_dies_in_the_middle_does_not_end_the_job(tmp_path: Path) -> None:
    """In a process of its own, whose end is looked at, too."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left alone from here on") == 1
    check_whole(tmp_path)


def test_what_fails_is_told_once_and_asked_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = WandbLog(tmp_path, "run", "offline")
    calls = []

    class Run:
        def log(self, values: Any) -> None:
            calls.append(values)
            raise OSError("no space left on device\nand more")

    log._experiment = Run()  # type: ignore[assignment]
    with pytest.warns(RuntimeWarning, match=r"failed to log figures \(OSError: no space left on device\)") as caught:
        log.log_metrics({"a": 1.0}, 0)
        log.log_metrics({"a": 2.0}, 1)
        log.log_table("t", columns=["a"], data=[[1]])
        log.log_image("i", ["nowhere.png"])
        log.log_hyperparams({"a": 1})
        log.keep(tmp_path)
    assert len(caught) == len(calls) == 1


def test_csv_comes_first_and_alone_without_wandb(tmp_path: Path) -> None:
    assert len(loggers(tmp_path, "model", None)) == 1
    first, second = loggers(tmp_path, "model", "offline")
    assert not isinstance(first, WandbLog) and isinstance(second, WandbLog)


def test_the_reader_finds_records_that_span_blocks(tmp_path: Path) -> None:
    """The tests above rest on it."""
    log = WandbLog(tmp_path, "run", "offline")
    long = ["x" * 50_000, "y" * 100_000]
    for step, text in enumerate(long):
        log.log_metrics({"text": text}, step)
    log.finish()
    assert [call["text"] for call in history(file_of(tmp_path))] == long
