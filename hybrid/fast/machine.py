"""The machine under us: what its processor is."""

import functools
import platform

import torch

# What decides how fast a product is, beside the vector width.
PRODUCTS = ("avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "bf16", "i8mm", "sve")


@functools.cache
def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The vector width that torch uses, and what the processor has for products."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return (torch.backends.cpu.get_cpu_capability(), *(name for name in PRODUCTS if name in flags))


def _cpuinfo(field: str) -> str:
    """Of the first core; empty where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field)
    except (OSError, StopIteration):
        return ""
