"""A model in use while it is trained."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def as_for_use(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and not compiled, for shapes that training does not have; afterwards as it was,
    each part in the mode that it had."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, training in modes:
            part.training = training
