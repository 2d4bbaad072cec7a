"""A save that fails leaves what was there; a checkpoint is data, whatever it was made to be."""

import io
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from oracles import tiny
from tiny_job import CONFIG
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.common.files import SaveError, replacing
from hybrid.training.callbacks import SaveModel
from hybrid.training.cli import HybridCLI
from hybrid.training.data import SudokuData
from hybrid.training.module import HybridTask
from hybrid.training.running.checkpoint import SafeCheckpointIO, read_checkpoint, save_folder
from hybrid.training.text.tokenizing import character_tokenizer


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As on a disk with so many bytes left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def job(folder: Path, steps: int, *callbacks: L.Callback) -> L.Trainer:
    """Train to that many steps, saving before each, and go on from what was saved."""
    saver = SaveModel(str(folder / "model"), 0.0)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[*callbacks, saver],
    )  # fmt: skip
    state = saver.state_file if saver.state_file.exists() else None
    trainer.fit(HybridTask(CONFIG), SudokuData(count=20, batch_size=4), ckpt_path=state, weights_only=False)
    return trainer


# --- Saving -------------------------------------------------------------------------------------------------

STATE = {
    "state_dict": {"weight": torch.arange(30_000.0)}, "loops": {}, "pytorch-lightning_version": "2.6.6",
    "many": [torch.arange(100.0) for _ in range(40)],
}  # fmt: skip


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    file, chosen = tmp_path / "new" / "job.ckpt", SafeCheckpointIO()
    chosen.save_checkpoint(STATE, file)
    found = chosen.load_checkpoint(file)
    assert torch.equal(found["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert [path.name for path in file.parent.iterdir()] == ["job.ckpt"]
    chosen.remove_checkpoint(file)
    assert not file.exists()


@pytest.mark.parametrize("size", [0, 1000, 100_000, 125_000, 135_000])  # whole, it is 150 KB
@pytest.mark.parametrize("there", [True, False])
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(size: int, there: bool, tmp_path: Path) -> None:
    file = tmp_path / "job.ckpt"
    if there:
        SafeCheckpointIO().save_checkpoint({**STATE, "before": True}, file)
    said = "what was saved there before is intact" if there else "nothing was saved there before"
    with no_file_larger_than(size), pytest.raises(SaveError, match=rf"job\.ckpt .*File too large.*{said}.*Make room"):
        SafeCheckpointIO().save_checkpoint(STATE, file)
    assert [path.name for path in tmp_path.iterdir()] == ["job.ckpt"] * there
    if there:
        assert read_checkpoint(file)["before"]


def test_an_interrupt_while_saving_leaves_nothing_half_done(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as file:
        file.write(b"half of it")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a": b"before"}


@pytest.mark.parametrize("size", [0, 100, 1200, 15_000])
def test_a_folder_that_finds_no_room_leaves_the_one_before(size: int, tmp_path: Path) -> None:
    tokenizer = character_tokenizer("abc")
    save_folder(tiny(0), tokenizer, tmp_path / "model")
    before = contents(tmp_path)
    with no_file_larger_than(size), pytest.raises(SaveError, match=r"model could not .*File too large.*intact"):
        save_folder(tiny(1), tokenizer, tmp_path / "model")
    assert contents(tmp_path) == before
    HybridForCausalLM.from_pretrained(tmp_path / "model")


def test_a_folder_keeps_what_is_not_a_model_and_loses_old_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_folder(tiny(0), character_tokenizer("abc"), folder)
    (folder / "notes.md").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"of a larger model")
    save_folder(tiny(1), character_tokenizer("abc"), folder)
    assert (folder / "notes.md").read_text() == "mine"
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]


class DiskFills(L.Callback):
    """From that step on, no file can be written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


def test_a_job_whose_disk_fills_stops_and_can_go_on(tmp_path: Path) -> None:
    said = r"model could not .*intact.*resume"
    with no_file_larger_than(resource.RLIM_INFINITY), pytest.raises(SaveError, match=said):
        job(tmp_path, 9, DiskFills(4))
    assert read_checkpoint(tmp_path / "model.ckpt")["global_step"] == 3
    HybridForCausalLM.from_pretrained(tmp_path / "model")
    assert job(tmp_path, 9).global_step == 9


def test_checkpoints_go_to_local_disks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://there is not on a local disk"):
        SafeCheckpointIO().save_checkpoint(STATE, "s3://there")


# --- Loading ------------------------------------------------------------------------------------------------


class Reduced:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Filled:
    """Unpickling it makes a dictionary and puts into it what unpickling `value` gives."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return dict, (), None, None, iter([("key", self.value)])


def payloads(canary: Path) -> dict[str, Any]:
    shell = Reduced(os.system, f"touch {canary}")
    script = f"open({str(canary)!r}, 'w').close()"
    made: dict[str, Any] = {
        "itself": shell,
        "weights": {"state_dict": {"model.lm_head.weight": shell}},
        "nested": {"state_dict": {}, "extra": [({"deep": (1, [shell])},)]},
        "optimizer": {"optimizer_states": [{"state": {0: {"exp_avg": shell}}, "param_groups": []}]},
        "callbacks": {"callbacks": {"SaveModel": {"random_states": shell}}},
        "loops": {"loops": {"fit_loop": shell}},
        "hyperparameters": {"hyper_parameters": {"_instantiator": shell}},
        "exec": {"lr_schedulers": [Reduced(exec, script)]},
        "eval": {"state_dict": Filled(Reduced(eval, f"[{script}]"))},
        "a pickle in a pickle": {"state_dict": Reduced(pickle.loads, pickle.dumps(shell))},
        "a storage": {"state_dict": Reduced(torch.storage._load_from_bytes, torch_bytes(shell))},
        "made by a function": {"state_dict": Reduced(Path.touch, canary)},
    }
    return made


def torch_bytes(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


NAMES = list(payloads(Path("unused")))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a job of one step saved."""
    folder = tmp_path_factory.mktemp("good")
    job(folder, 1)
    return read_checkpoint(folder / "model.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_would_run_code_does_nothing(
    name: str, zipped: bool, good: dict[str, Any], tmp_path: Path
) -> None:
    canary, file = tmp_path / "canary", tmp_path / "model.ckpt"
    payload = payloads(canary)[name]
    whole = {**good, **payload} if isinstance(payload, dict) else payload
    torch.save(whole, file, _use_new_zipfile_serialization=zipped)
    torch.load(file, weights_only=False)
    assert canary.exists(), "the payload works where it is let"
    canary.unlink()
    with pytest.raises(ValueError, match=rf"{file} was not loaded.*could run code"):
        job(tmp_path, 2)
    assert not canary.exists()
    assert not (tmp_path / "model").exists()


def test_the_command_line_runs_no_code_either(good: dict[str, Any], tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "bad.ckpt"
    torch.save({**good, **payloads(canary)["hyperparameters"]}, file)
    words = [
        "fit", "--data=hybrid.training.data.SudokuData", "--data.count=20", "--data.batch_size=4",
        "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--out", str(tmp_path / "out"),
        *(f"--model.config.{field}={value}" for field, value in CONFIG.items()),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=rf"{file} was not loaded"):
        HybridCLI.run([*words, "--ckpt_path", str(file)])
    assert not canary.exists()
    with pytest.raises(SystemExit):
        HybridCLI.run([*words, "--weights_only=false"])


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda file: None, "there is no checkpoint .*seen from"),
        (lambda file: file.write_bytes(b"not a checkpoint"), "damaged"),
        (lambda file: file.write_bytes(b""), "damaged"),
        (lambda file: torch.save({"weight": torch.zeros(2)}, file), "not written by a Lightning job.*init_from"),
        (lambda file: torch.save([1, 2], file), "not written by a Lightning job"),
        (lambda file: torch.save(STATE, file) or file.write_bytes(file.read_bytes()[:90_000]), "damaged"),
    ],
)
def test_what_is_no_checkpoint_is_named(write: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    write(tmp_path / "some.ckpt")
    with pytest.raises(ValueError, match=rf"some\.ckpt.*{said}|{said}.*some\.ckpt|{said}"):
        read_checkpoint(tmp_path / "some.ckpt")


def test_a_checkpoint_of_another_size_is_refused(good: dict[str, Any], tmp_path: Path) -> None:
    weights: dict[str, Tensor] = good["state_dict"]
    name = next(iter(weights))
    torch.save({**good, "state_dict": {**weights, name: torch.zeros(3, 5)}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint .* another model.*embed_tokens.*\[3, 5\].*\[8?\d+, 16\]"):
        job(tmp_path, 2)
