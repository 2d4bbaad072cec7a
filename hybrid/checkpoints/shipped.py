"""Models and draft adapters that come inside the package: they load by their name, without a network."""

from pathlib import Path
from typing import Any

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
