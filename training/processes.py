"""What several processes of one job must agree on: whoever acted alone would leave the others waiting for ever."""

import torch
import torch.distributed as dist


def several() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def anywhere(*flags: bool, device: torch.device) -> list[bool]:
    """For each flag, whether it is up in any process. All processes must call this together."""
    if not several():
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def raise_together(error: Exception | None) -> None:
    """Raise in every process what the first one has met, or nothing. All processes must call this together.

    Raises:
        Exception: `error` in the process that gave it, one of the same kind and words in the others.
    """
    if several():
        met = [None if error is None else (type(error), str(error))]
        dist.broadcast_object_list(met)
        if error is None and met[0] is not None:
            kind, said = met[0]
            raise kind(said)
    if error is not None:
        raise error
