"""Models that come inside the package: they load by their name, without a network."""

from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "models"


def place(name: Any) -> Any:
    """The folder of a shipped model, where `name` is one of theirs; anything else as it is.

    A folder of that name in the working directory comes first.
    """
    if isinstance(name, str) and name in shipped() and not Path(name).exists():
        return str(MODELS / name)
    return name


def shipped() -> list[str]:
    """The names of the models in this installation."""
    return sorted(folder.name for folder in MODELS.glob("*") if (folder / "config.json").exists())
