"""Which number format trains fastest on this machine without losing anything that matters."""

from typing import Literal

import torch


def best_precision() -> Literal["bf16-mixed", "32-true"]:
    """bfloat16 autocast where the hardware multiplies it (recent GPUs, CPUs with AMX), else float32: elsewhere it is
    emulated, and slower. The weights themselves are float32 in either."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    return "bf16-mixed" if torch.cpu._is_amx_tile_supported() else "32-true"
