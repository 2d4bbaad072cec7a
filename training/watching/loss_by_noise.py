"""What the model knows at each noise level: loss and accuracy at masked slots against the time t of their block."""

import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from hybrid.common.checks import require
from hybrid.training.component import Losses
from hybrid.training.running.innards import accumulates
from hybrid.training.running.processes import anywhere, gathered, is_first
from hybrid.training.watching.csv_log import step_is_logged, write
from hybrid.training.watching.showing import show_picture


class LossByNoise(L.Callback):
    """Logs, over the masked slots of the steps since the last log, the mean cross-entropy in nats (`loss_at_t/0.05`)
    and the share of right guesses (`accuracy_at_t/0.05`) in equal ranges of t, named by their middle; and draws both.

    The picture, `loss_by_noise.png` beside the CSV log and in loggers that take images, has one curve for each time it
    was drawn: over the steps since the time before.

    Args:
        bins: ranges of t.
        minutes: between two drawings; the last is made at the end.

    Raises:
        ValueError: `bins` is below 1, or `minutes` negative.
    """

    def __init__(self, bins: int = 10, minutes: float = 10.0) -> None:
        require(bins >= 1, f"bins is {bins}; t needs at least one range.")
        require(minutes >= 0, f"minutes is {minutes}; it must not be negative.")
        self.bins, self.minutes = bins, minutes
        self._step, self._logged, self._drawn = (torch.zeros(3, bins, dtype=torch.float64) for _ in range(3))
        self._curves: list[tuple[int, Tensor]] = []
        self._drew_at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Processes agree on the folder here, all together.
        self.picture = Path(trainer.log_dir or ".") / "loss_by_noise.png" if trainer.loggers else None
        self._step.zero_()
        self._drew_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self._step += binned(pl_module.last_losses, self.bins)
        if accumulates(trainer):
            return
        # What is saved has whole steps only: a step that was not done begins anew on resuming.
        self._logged += self._step
        self._drawn += self._step
        self._step.zero_()
        if step_is_logged(trainer):
            write(trainer, self._figures(_of_all(self._logged)))
            self._logged.zero_()
            (due,) = anywhere(time.monotonic() - self._drew_at > 60 * self.minutes, device=pl_module.device)
            if due:
                self._draw(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._draw(trainer)

    def _figures(self, sums: Tensor) -> dict[str, float]:
        found = {}
        for at, (count, nll, right) in enumerate(sums.T.tolist()):
            if count:
                middle = f"{(at + 0.5) / self.bins:.3g}"
                found[f"loss_at_t/{middle}"] = nll / count
                found[f"accuracy_at_t/{middle}"] = right / count
        return found

    def _draw(self, trainer: L.Trainer) -> None:
        self._drew_at = time.monotonic()
        drawn = _of_all(self._drawn)
        self._drawn.zero_()
        if not drawn.any() or self.picture is None or not trainer.is_global_zero:
            return
        self._curves.append((trainer.global_step, drawn))
        if len(self._curves) > 8:  # a long job keeps the whole way in view
            self._curves = self._curves[::2]
        try:
            from hybrid.training.watching.noise_picture import noise_picture

            noise_picture(self._curves, self.picture)
        except Exception as error:  # a job is worth more than its picture
            warnings.warn(f"{self.picture} could not be drawn: {error}", RuntimeWarning, stacklevel=2)
            return
        for logger in trainer.loggers:
            show_picture(logger, "loss_by_noise", self.picture, trainer.global_step - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"logged": _of_all(self._logged), "drawn": _of_all(self._drawn), "curves": list(self._curves)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if is_first() and state_dict["logged"].shape == self._logged.shape:  # else the job goes on with other ranges
            self._logged, self._drawn = state_dict["logged"].clone(), state_dict["drawn"].clone()
            self._curves = [(step, sums) for step, sums in state_dict["curves"]]


def _of_all(sums: Tensor) -> Tensor:
    """Added up over all processes, which must call this together."""
    return torch.stack(gathered(sums.clone())).sum(0)


def binned(found: Losses | None, bins: int) -> Tensor:
    """Of the masked slots in each of `bins` ranges of t: their number, the sum of their cross-entropies in nats, and
    the number of right guesses; float64 `[3, bins]` on the CPU."""
    if found is None or found.masked_nll is None or found.masked_t is None or found.masked_right is None:
        return torch.zeros(3, bins, dtype=torch.float64)
    place = (found.masked_t * bins).long().clamp(0, bins - 1)
    nll = found.masked_nll.float()
    values = torch.stack([torch.ones_like(nll), nll, found.masked_right])
    # Not every device has float64; a batch has too few slots to need it.
    return torch.zeros(3, bins, device=place.device).index_add_(1, place, values).double().cpu()
