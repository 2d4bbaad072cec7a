"""What a trained model says of each held-out row, as a file: which text is hard for it, and how hard."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter


class WritePredictions(BasePredictionWriter):
    """Writes `NAME-predictions.jsonl` when a job predicts, a line a row; further processes add their number.

    Each line has the row's number, its text, how many tokens of it are learned, and its losses in nats, as they would
    be in training on this row alone.
    """

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.name = folder, name

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        number = f"-{trainer.global_rank}" if trainer.global_rank else ""
        self.file = self.folder / f"{self.name}-predictions{number}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: Any, prediction: Any, batch_indices: Sequence[int] | None, batch: Any,
        batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        with self.file.open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            print(f"wrote {self.file}")
