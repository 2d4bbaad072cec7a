"""A job's checkpoints and model folders: written whole (`hybrid.common.files`), read back as data and never as code."""

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError

from hybrid.checkpoints.card import write_card
from hybrid.common.files import replacing, save_error, sync


def check_writable(folder: Path) -> None:
    """Write a little where a job will write much: its model folder, and the checkpoint beside it.

    Raises:
        SaveError: it cannot be done.
    """
    probes = [folder.with_name(f".{folder.name}.probe")]
    if folder.exists():
        probes.append(folder / ".probe")
    state = folder.with_name(f"{folder.name}.ckpt")
    try:
        if state.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(state))
        for probe in probes:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink(missing_ok=True)  # another process of the job may look at the same time
    except OSError as error:
        raise save_error(state if state.is_dir() else folder, error) from error


def save_folder(
    model: Any, tokenizer: Any, folder: Path, facts: Mapping[str, object] | None = None,
    beside: Callable[[Path], None] = lambda folder: None,
) -> None:  # fmt: skip
    """Write model (safetensors), tokenizer (if any) and what `beside` adds as one folder that `from_pretrained` loads.

    Args:
        facts: of its training, for the model card.

    Raises:
        SaveError: they could not be written; `folder` is as it was, and nothing is left beside it.
    """
    new = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with suppress(FileNotFoundError):  # a model card of the user's own stays
            shutil.copyfile(folder / "README.md", new / "README.md")
        model.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if facts:
            write_card(new, model.config, facts=facts)
        beside(new)
        files = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
        for name in files:
            sync(new / name)
        # All is written: from here on only names change, file by file, so that there is a model at every moment.
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)
        for path in folder.glob("*.safetensors*"):  # of an earlier model, saved in other parts
            if path.relative_to(folder) not in files:
                path.unlink()
        sync(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise save_error(folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """What a Lightning checkpoint holds, on the CPU; with `mmap`, tensors are read when they are used.

    Raises:
        ValueError: the file is not a whole checkpoint of a Lightning job, or holds anything but tensors and plain
            values, which could run code: nothing of it was run.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the .ckpt file beside it, or a model folder with init_from.")
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; is the path right, seen from {Path.cwd()}?")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(
            f"{path} was not loaded: it is damaged, or holds objects other than tensors and plain values, which could "
            "run code. Use a checkpoint that this library wrote, or a model folder with init_from."
        ) from error
    if not isinstance(found, dict) or not {"state_dict", "loops", "pytorch-lightning_version"} <= found.keys():
        raise ValueError(
            f"{path} was not written by a Lightning job, so there is nothing to go on from: for weights alone, give a "
            "model folder with init_from."
        )
    return found


class SafeCheckpointIO(CheckpointIO):
    """How Lightning reads and writes a job's checkpoints, on local disks."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`.

        Raises:
            SaveError: it could not be written; what was at `path` is as it was.
            ValueError: `path` is an address and not a file name.
        """
        if "://" in str(path):
            raise ValueError(f"{path} is not on a local disk: save there, and copy it afterwards.")
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What `read_checkpoint` gives, and raises; `weights_only` makes no difference: nothing else is ever loaded."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete it, if it is there."""
        Path(path).unlink(missing_ok=True)
