"""The decode loop and its small swappable rules."""

from hybrid.sampling.decode import decode, decode_all
from hybrid.sampling.generate import GenerateOutput, generate, infill
from hybrid.sampling.options.checks import LogitsError
from hybrid.sampling.record import Step
from hybrid.sampling.request import Done, Request
from hybrid.sampling.reveal import Canvas, Reveal
from hybrid.sampling.session import Session
from hybrid.sampling.stats import GenerationStats, RowStats

__all__ = [
    "Canvas", "Done", "GenerateOutput", "GenerationStats", "LogitsError", "Request", "Reveal", "RowStats", "Session",
    "Step", "decode", "decode_all", "generate", "infill",
]  # fmt: skip
