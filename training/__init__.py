"""Objectives, data, the LightningModule and its recipes.

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

__getattr__, __all__ = names_of(__name__, {
    "hybrid.noise": ["Noise"],
    "hybrid.training.batch": ["Batch", "as_batch"],
    "hybrid.training.callbacks": ["ProgressBar", "SaveModel"],
    "hybrid.training.component": ["Component", "Losses", "Part"],
    "hybrid.training.objectives.curriculum": ["Curriculum"],
    "hybrid.training.data": ["HybridData", "StdlibData", "SudokuData", "TextData"],
    "hybrid.training.objectives.drafter": ["Drafter"],
    "hybrid.training.objectives.grpo": ["GRPO"],
    "hybrid.training.job": ["fit"],
    "hybrid.adapters.lora": ["LoRA"],
    "hybrid.training.watching.loss_by_noise": ["LossByNoise"],
    "hybrid.training.module": ["HybridTask"],
    "hybrid.training.objective": ["Objective", "losses"],
    "hybrid.training.optimizer": ["Optimizer"],
    "hybrid.training.running.precision": ["best_precision"],
    "hybrid.training.tasks.questions": ["CountdownData", "ReasoningData"],
    "hybrid.training.watching.samples": ["SampleModes"],
    "hybrid.training.watching.throughput": ["Throughput"],
    "hybrid.training.watching.wandb_log": ["WandbLog"],
})  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
