"""The global random states, so that a resumed job draws what it would have drawn.

Nothing in this library reads them: noise and order follow from seeds and sample numbers. Dropout in an adapter, or a
user's own callback, does.
"""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hybrid.training.running.processes import gathered, several


def random_states() -> list[dict[str, Any]]:
    """Python's, NumPy's and PyTorch's state in each process, as plain values and tensors.

    With several processes, all must call this together.
    """
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one is meant)
    own: dict[str, Any] = {
        "python": random.getstate(), "torch": torch.get_rng_state(),
        "numpy": (kind, np.asarray(keys).tolist(), place, has_gauss, gauss),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }  # fmt: skip
    return gathered(own)


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Put back what `random_states` gave; with another number of processes, whose draws differ anyway, nothing."""
    if len(states) != (dist.get_world_size() if several() else 1):
        return
    own = states[dist.get_rank() if several() else 0]
    random.setstate(own["python"])
    kind, keys, *rest = own["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(own["torch"])
    if own["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
