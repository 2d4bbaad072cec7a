"""What a command works with: a model by its name, where it is to run, and its tokenizer."""

import os
from pathlib import Path
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.checkpoints import folder
from hybrid.checkpoints.place import place
from hybrid.commands.options import On


def load(model: str, on: On = On()) -> HybridForCausalLM:
    """A model for use.

    Raises:
        ValueError: its folder has not been made yet, or there is no such device.
    """
    device = _device(on.device)
    given: dict[str, Any] = {} if on.dtype is None else {"dtype": on.dtype}
    return HybridForCausalLM.from_pretrained(place_of(model), **given).eval().to(device)


def load_tokenizer(model: str) -> Any:
    """The tokenizer that belongs to a model."""
    return folder.load_tokenizer(place_of(model))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no GPU that this PyTorch can use")
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: {error}; use cpu, or cuda where there is a GPU.") from error
    return device


def place_of(model: str) -> str:
    """Where a model lies: a folder, also that of a shipped one, or a hub name.

    Raises:
        ValueError: there is no such folder, or it is a file.
    """
    path = Path(found := place(model))
    if path.is_file():
        raise ValueError(f"model: {model} is a file; name the folder of a model. `hybrid convert` reads GGUF files.")
    if not path.exists() and (path.is_absolute() or path.parts[0] in ("runs", ".", "..") or len(path.parts) > 2):
        raise ValueError(
            f"model: there is no folder {model}. `hybrid quickstart` trains two in runs/quickstart in a few minutes; "
            "name another with --model, or leave it out for the one that is shipped."
        )
    return found
