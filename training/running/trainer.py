"""The trainer of a recipe."""

import sys
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hybrid.training.running.precision import best_precision


class JobTrainer(L.Trainer):
    """Lightning's, which also takes `precision: auto`: what `best_precision` says of this machine.

    Args:
        precision: Lightning's, or "auto".
    """

    def __init__(self, *args: Any, precision: int | str | None = None, **kwargs: Any) -> None:
        chosen = best_precision() if precision == "auto" else precision
        super().__init__(*args, precision=chosen, **kwargs)
        if precision == "auto":
            _tell(f"precision: {chosen}, the faster one on this machine (auto)")


@rank_zero_only
def _tell(what: str) -> None:
    print(what, file=sys.stderr)
