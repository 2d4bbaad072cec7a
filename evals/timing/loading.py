"""What loading a folder takes beside transformers' own loading, and what converting it takes in memory."""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

from hybrid import HybridConfig, HybridForCausalLM
from hybrid.evals.timing.bench import take_turns

OURS, CHECKED, THEIRS = "hybrid", "hybrid, checksums anew", "transformers"

# A process of its own, or what was loaded before would count: how far it grows over what its imports take. Converting
# something tiny first imports what is imported late.
CONVERT = """
import resource, sys
from pathlib import Path
import torch
from hybrid.checkpoints.convert import convert
from hybrid import HybridConfig, HybridForCausalLM
torch.set_num_threads(1)
source, out, to, work = sys.argv[1:]
size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
HybridForCausalLM(HybridConfig(**size, mask_token_id=3)).save_pretrained(work + "/tiny")
convert(work + "/tiny", work + "/tiny-out", to="llama")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(source, out, to=to or None)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Attributes:
    seconds: of each way to load, in turns.
    weights: bytes of the model's files.
    peak: bytes that converting took in memory at once, beyond what Python and its imports take.
    convert_seconds: how long it took, with starting Python.
    """

    seconds: dict[str, list[float]]
    weights: int
    peak: int
    convert_seconds: float

    def ratio(self, name: str) -> float:
        """Median seconds of a way to load, over transformers'."""
        return statistics.median(self.seconds[name]) / statistics.median(self.seconds[THEIRS])


def loading(folder: str | Path, rounds: int = 7) -> Loading:
    """Load a folder of ours and the same weights as transformers' own format, in turns within one run.

    Raises:
        ValueError: the folder is none of ours, or transformers has no class for what it is.
    """
    config = HybridConfig.from_pretrained(folder)
    to = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    with tempfile.TemporaryDirectory() as work:
        began = time.perf_counter()
        peak = convert_peak(folder, Path(work, "theirs"), to=to)
        took = time.perf_counter() - began
        runs = {
            OURS: lambda: HybridForCausalLM.from_pretrained(folder),
            CHECKED: lambda: HybridForCausalLM.from_pretrained(folder, verify=True),
            THEIRS: lambda: AutoModelForCausalLM.from_pretrained(Path(work, "theirs")),
        }
        seconds = take_turns(runs, rounds)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return Loading(seconds=seconds, weights=size, peak=peak, convert_seconds=took)


def convert_peak(source: str | Path, out: Path, to: str | None = None) -> int:
    """Convert, and say how many bytes of memory that took at once, beyond what Python and its imports take.

    Raises:
        ValueError: it could not be converted; the message is the converter's.
    """
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-c", CONVERT, str(Path(source).absolute()), str(out.absolute()), to or "", work]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{source} could not be converted: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])
