"""How much of the machine a job uses: the arithmetic that its steps need, over what the device could have done.

    MFU = (model FLOPs of the steps / seconds) / peak FLOPs a second        (PaLM, arXiv 2204.02311, appendix B)

Only the arithmetic of the model counts: what gradient checkpointing computes twice does not, and neither do norms,
activations and the optimizer.
"""

import functools
import time

import torch

from hybrid import HybridConfig

# Dense peaks, in 1e12 FLOPs a second: bfloat16 and float16, float32 on tensor cores (TF32), plain float32. From
# NVIDIA's data sheets, where "with sparsity" is twice as much. The first name that a device's name contains counts.
GPUS: dict[str, tuple[float, float, float]] = {
    "B200": (2250, 1125, 75),
    "H200": (989.4, 494.7, 66.9),
    "H100 NVL": (835, 417.5, 60),
    "H100 PCIe": (756, 378, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "A10": (125, 62.5, 31.2),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
}


def slot_flops(config: HybridConfig, length: int) -> int:
    """FLOPs of one slot of the input, forward and backward, the head left out: 6 N + 12 L H D T.

    N: entries of the matrices inside the layers. L layers of H heads with D dimensions. T is `length`, the tokens of
    a row: a slot of either stream sees at most so many keys. As in PaLM, what the mask leaves out is not subtracted.
    """
    size, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = size * config.head_dim * (2 * heads + 2 * groups)
    layer = attention + 3 * size * config.intermediate_size
    scores = heads * config.head_dim * length
    return config.num_hidden_layers * (6 * layer + 12 * scores)


def logit_flops(config: HybridConfig) -> int:
    """FLOPs of one row of logits, forward and backward: 6 V C for V tokens and hidden size C."""
    return 6 * config.vocab_size * config.hidden_size


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """FLOPs a second that a device could do at best in matrices of `dtype`, and where the figure is from; None, and
    why, where it is not known.

    A GPU's is looked up; a CPU's is measured once a process, by a matrix product over the threads of this process.
    """
    if device.type == "cpu":
        return _measured(dtype, torch.get_num_threads()), "the best of a few products of 1024 x 1024 matrices"
    if device.type != "cuda":
        return None, f"the peak of a {device.type} device is not known"
    name = torch.cuda.get_device_name(device)
    for known, (half, tensor, plain) in GPUS.items():
        if known.lower() in name.lower().replace("-", " "):
            single = plain if torch.get_float32_matmul_precision() == "highest" else tensor
            return 1e12 * (single if dtype == torch.float32 else half), f"the data sheet of {known}"
    return None, f"the peak of {name} is not in the table of hybrid.training.watching.flops"


@functools.cache
def _measured(dtype: torch.dtype, threads: int) -> float:
    size, best = 1024, float("inf")
    a, out = torch.ones(size, size, dtype=dtype), torch.empty(size, size, dtype=dtype)
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
