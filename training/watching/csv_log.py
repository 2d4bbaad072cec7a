"""The figures of a job as a CSV file that a kill does not spoil and that a resumed job goes on with."""

import csv
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hybrid.common.files import replacing
from hybrid.training.running.innards import accumulates, logs_now


class CSVLog(CSVLogger):
    """Lightning's, written at every logged step: a checkpoint never knows more steps than the log.

    What is logged for one step before `save` is called, as Lightning does, becomes one row.

    Args:
        folder: where `logs/NAME/metrics.csv` is.
        name: of the job.
        resume: keep what the file has, for `rewind` to cut; else begin anew.
    """

    def __init__(self, folder: Path, name: str, resume: bool = False) -> None:
        super().__init__(folder, name="logs", version=name, flush_logs_every_n_steps=sys.maxsize)
        self.file = folder / "logs" / name / "metrics.csv"
        self._kept = self.file.read_text() if resume and self.file.exists() else ""
        self._columns: list[str] = []

    @property
    def last(self) -> int:
        """The last step that an earlier part of the job has logged, -1 if there is none."""
        return max((int(row["step"]) for row in self._logged()), default=-1)

    def _logged(self) -> list[dict[str, str]]:
        whole = self._kept[: self._kept.rfind("\n") + 1]  # a kill can cut the last line short
        return list(csv.DictReader(io.StringIO(whole)))

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget what was logged at `step` and later: the job goes on from there, and logs it again."""
        if rows := [row for row in self._logged() if int(row["step"]) < step]:
            _ = self.experiment  # Lightning makes the folder, and empties it
            self._rewrite(rows)

    @rank_zero_only
    def save(self) -> None:
        if not self.experiment.metrics:
            return
        steps: dict[int, dict[str, Any]] = {}
        for row in self.experiment.metrics:
            steps.setdefault(row["step"], {}).update(row)
        rows = list(steps.values())
        if set().union(*rows) <= set(self._columns):
            try:
                with self.file.open("a", newline="") as file:
                    csv.DictWriter(file, self._columns).writerows(rows)
            except OSError as error:  # the system does not say of which file
                raise OSError(error.errno, error.strerror, str(self.file)) from error
        else:
            earlier: list[dict[str, Any]] = []
            if self._columns:
                with self.file.open(newline="") as file:
                    earlier = list(csv.DictReader(file))
            self._rewrite([*earlier, *rows])
        self.experiment.metrics = []

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self._columns = sorted(set().union(*rows))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self._columns)
        table.writeheader()
        table.writerows(rows)
        with replacing(self.file) as file:
            file.write(text.getvalue().encode())


def step_is_logged(trainer: L.Trainer) -> bool:
    """At the end of a batch: whether Lightning is about to log the step that it completed."""
    return logs_now(trainer) and not accumulates(trainer)


def write(trainer: L.Trainer, figures: Mapping[str, float]) -> None:
    """Log figures of the step that was just completed. `LightningModule.log` would repeat, in a later row, a figure
    that this row did not have."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), trainer.global_step - 1)  # the number that Lightning gives this step
