"""What several processes of one job must agree on: whoever acted alone would leave the others waiting for ever."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


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


def gathered(value: Value) -> list[Value]:
    """The value of each process, this one's alone where there is no other. All processes must call this together."""
    if not several():
        return [value]
    found = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def is_first() -> bool:
    """Whether this is the process that writes what all of them have found."""
    return not several() or dist.get_rank() == 0


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes. All processes must call this together."""
    if several():
        values = values.clone()
        dist.all_reduce(values)
    return values


def of_first(value: float, device: torch.device) -> float:
    """The first process's value. All processes must call this together."""
    found = torch.tensor(value, dtype=torch.float32, device=device)
    dist.broadcast(found, 0)
    return float(found)


@contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """What the first process meets in here, of these kinds, is raised in every process. All must enter together.

    Raises:
        Exception: in the process that met it the very one, in the others one of the same kind and words.
    """
    error: Exception | None = None
    try:
        yield
    except kinds as met_here:
        error = met_here
    if several():
        met = [None if error is None else (type(error), str(error))]
        dist.broadcast_object_list(met)
        if error is None and met[0] is not None:
            kind, said = met[0]
            raise kind(said)
    if error is not None:
        raise error
