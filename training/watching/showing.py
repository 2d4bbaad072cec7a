"""Pictures and tables in whatever logger takes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger


def show_picture(logger: Logger, name: str, file: Path, step: int) -> None:
    """Add a PNG file to what a logger shows, if it shows pictures."""
    if hasattr(logger, "log_image"):
        logger.log_image(name, [str(file)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        from matplotlib.image import imread

        logger.experiment.add_image(name, imread(file)[..., :3], step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(file))


def show_table(logger: Logger, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Add a table to what a logger shows, if it shows tables or text."""
    if hasattr(logger, "log_table"):
        logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
        return
    lines = [columns, ["---"] * len(columns), *rows]
    text = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, text, step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, text, f"{name}-{step}.md")


def _cell(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", "⏎")
