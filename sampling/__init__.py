"""The decode loop and its small swappable rules."""

from hybrid.sampling.generate import GenerateOutput, generate, infill
from hybrid.sampling.record import Step
from hybrid.sampling.reveal import Canvas, Reveal
from hybrid.sampling.stats import GenerationStats, RowStats

__all__ = ["Canvas", "GenerateOutput", "GenerationStats", "Reveal", "RowStats", "Step", "generate", "infill"]
