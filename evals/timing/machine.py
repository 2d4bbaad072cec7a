"""What a speed depends on, and how much memory it took."""

import os
import platform
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from hybrid import HybridForCausalLM
from hybrid.fast.costs import cpu_name


def environment(model: HybridForCausalLM) -> dict[str, Any]:
    """Machine, number format, threads and versions, for the results document."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


class PeakMemory:
    """Bytes in use at the most since it was made: tensors on a GPU, else the process's resident set, Python and the
    weights included (Linux only).

    A process seldom gives memory back, so a setting that was run after a hungry one may show some of the other's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far: man 5 proc
            self.works = True
        except OSError:
            self.works = False

    @property
    def bytes(self) -> int | None:
        """None where the system does not say."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if not self.works:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        found = [line.split() for line in lines if line.startswith("VmHWM:")]
        return int(found[0][1]) * 1024 if found else None
