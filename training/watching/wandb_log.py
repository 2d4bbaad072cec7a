"""Weights & Biases as a witness: whatever happens to it, the job goes on, and the CSV log has the same figures."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

Tracking = Literal["offline", "online"]

# Seconds that the service is waited for: at the start, and at the end, where wandb itself would wait for ever.
PATIENCE = {"init_timeout": 60.0, "finish_timeout": 600.0}


class WandbLog(WandbLogger):
    """Lightning's, which no failure of wandb gets out of.

    A service that cannot be reached at the start, or refuses the account, makes the run an offline one, which `wandb
    sync` uploads later. After any other failure nothing more is sent. Either is told once. wandb itself keeps trying
    when the network fails in the middle of a run; at the end it gets ten minutes for what is left.

    Args:
        folder: where the folder `wandb` is.
        name: of the run.
        mode: "offline" needs neither account nor network.
        config: the job's settings, to be shown with the run.
        artifact: keep the trained model with the run, too.
        project: of the run; $WANDB_PROJECT goes before it.
        id: of the run to go on with. Offline each part has a file of its own, of which `wandb sync --append` makes one
            run.
        rows: how many the run had when the job was saved with which it goes on.
        cut: it has more by now, which are to be forgotten, as the CSV log forgets them: the run is rewound, offline by
            a note in the file of the new part. Where the service refuses that (not every account may do it), what the
            run has stays, and the same steps, logged again, are left out.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(
        self, folder: Path, name: str, mode: Tracking, *, config: dict[str, Any] | None = None, artifact: bool = False,
        project: str = "hybrid", id: str | None = None, rows: int = 0, cut: bool = False,
    ) -> None:  # fmt: skip
        # Not `offline=True`, which would change this process's environment, and every later run with it.
        super().__init__(
            name=name, save_dir=folder, project=os.environ.get("WANDB_PROJECT", project), mode=mode, id=id,
            config=config or {},
        )  # fmt: skip
        self._experiment: Any = None
        self.artifact = artifact
        self._rows, self._cut = (rows, cut and rows > 0) if id is not None else (0, False)
        self._given_up = False
        self._place: tuple[str, int] | None = None  # where it was last
        self._sent = -1  # the last step that the run has, of a job that goes on before it

    def rewind(self, last: int) -> None:
        """The job goes on before step `last`, which it has logged already."""
        self._sent = last

    @property
    def place(self) -> tuple[str, int] | None:
        """What wandb calls the run, and how many rows it has, or had when last asked; None before there is one."""
        if self._experiment is not None:
            self._try("say how many rows it has", self._ask)
        return self._place

    def _ask(self) -> None:
        self._place = str(self._experiment.id), int(self._experiment.step)

    @property
    def experiment(self) -> Any:
        """The wandb run; where there is none, something that takes every call and does nothing."""
        if self._given_up or rank_zero_only.rank != 0:
            return DummyLogger().experiment
        if self._experiment is None:
            self._try("start", self._start)
        return DummyLogger().experiment if self._experiment is None else self._experiment

    def _start(self) -> None:
        import wandb

        known = {k: v for k, v in PATIENCE.items() if k in wandb.Settings.model_fields}  # older ones know fewer
        self._wandb_init["settings"] = wandb.Settings(**known)
        self._cut = self._cut and self._begun_again()
        if self._cut:
            return
        try:
            run = super().experiment
            if self._rows and self._wandb_init["mode"] == "offline":
                run.log({}, step=self._rows)  # rows are numbered on, not anew
        except Exception as error:
            if self._wandb_init["mode"] == "offline":
                raise
            self._wandb_init["mode"] = "offline"
            run = super().experiment
            warnings.warn(
                f"wandb could not be reached ({_first_line(error)}), so this run is logged offline: `wandb sync "
                f"{Path(run.dir).parent}` uploads it. The job goes on, and the CSV log has all figures.",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip

    def _begun_again(self) -> bool:
        """Whether the run could be rewound to the rows that it had."""
        usual = dict(self._wandb_init)
        self._wandb_init |= {"resume": None, "resume_from": f"{usual['id']}?_step={self._rows - 1}"}
        try:
            _ = super().experiment
        except Exception as error:
            self._wandb_init.clear()
            self._wandb_init.update(usual)
            warnings.warn(
                f"wandb did not rewind the run ({_first_line(error)}): what it has of the steps that are done again "
                "stays. The CSV log has all figures.", RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            return False
        return True

    def _try(self, what: str, call: Callable[[], Any]) -> None:
        if self._given_up:
            return
        try:
            call()
        except Exception as error:
            self._given_up = True
            warnings.warn(
                f"wandb failed to {what} ({type(error).__name__}: {_first_line(error)}), and is left alone from here "
                "on. The job goes on, and the CSV log has all figures.",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        _ = self.experiment  # and with it, whether it was rewound
        if step is not None and step <= self._sent and not self._cut:
            return
        self._try("log figures", lambda: super(WandbLog, self).log_metrics(metrics, step))

    def log_hyperparams(self, params: Any) -> None:
        self._try("log settings", lambda: super(WandbLog, self).log_hyperparams(params))

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self._try("log a table", lambda: super(WandbLog, self).log_table(*args, **kwargs))

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        self._try("log a picture", lambda: super(WandbLog, self).log_image(*args, **kwargs))

    @rank_zero_only
    def keep(self, folder: Path) -> None:
        """Add a model folder to the run as an artifact, if that was asked for."""
        if self.artifact:
            self._try("keep the model", lambda: self._keep(folder))

    def _keep(self, folder: Path) -> None:
        import wandb

        run = self.experiment
        model = wandb.Artifact(f"{run.project}-{folder.name}", type="model")
        model.add_dir(str(folder))
        run.log_artifact(model)

    @rank_zero_only
    def finish(self) -> None:
        """Close the run, so that the next job of this process has one of its own."""
        if self._experiment is not None:
            self._try("finish", self._experiment.finish)
            self._experiment = None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
