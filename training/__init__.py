"""Objectives, data, the LightningModule and its recipes.

To be read in this order: job.py, a job from Python (cli.py makes the same of a recipe); module.py, what is trained, and
step.py, how, hook by hook; objective.py, what is learned, as one kind of what component.py says; optimizer.py; data.py
and batch.py; callbacks.py, what is shown and saved meanwhile.

Names are looked up when they are first used: Lightning takes seconds to import, and not everything here needs it.
"""
# ruff: noqa: F401 (the imports are for those who read types)

from typing import TYPE_CHECKING

from hybrid.common.lazy import names_of

if TYPE_CHECKING:
    from hybrid.adapters.lora import LoRA
    from hybrid.noise import Noise
    from hybrid.training.batch import Batch, as_batch
    from hybrid.training.callbacks import ProgressBar, SaveModel
    from hybrid.training.component import Component, Losses, Part
    from hybrid.training.data import HybridData, StdlibData, SudokuData, TextData
    from hybrid.training.job import fit
    from hybrid.training.module import HybridTask
    from hybrid.training.objective import Objective, losses
    from hybrid.training.objectives.curriculum import Curriculum
    from hybrid.training.objectives.drafter import Drafter
    from hybrid.training.objectives.grpo import GRPO
    from hybrid.training.optimizer import Optimizer
    from hybrid.training.running.precision import best_precision
    from hybrid.training.tasks.questions import CountdownData, ReasoningData
    from hybrid.training.watching.loss_by_noise import LossByNoise
    from hybrid.training.watching.samples import SampleModes
    from hybrid.training.watching.throughput import Throughput
    from hybrid.training.watching.wandb_log import WandbLog

__getattr__, __all__ = names_of(__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
