"""The decode loop and its small swappable rules."""

from hybrid.sampling.generate import GenerateOutput, generate
from hybrid.sampling.reveal import Canvas, Reveal
from hybrid.sampling.stats import GenerationStats, RowStats

__all__ = ["Canvas", "GenerateOutput", "GenerationStats", "Reveal", "RowStats", "generate"]
