"""Ending a row early: transformers' stopping criteria and stop strings, asked once for every settled token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Halt:
    """`criteria`: functions of one row's text so far, int64 `[1, T]`, and None; true (or a true tensor) ends the row
    with the last token. False when there are none."""

    criteria: Sequence[Callable[..., object]] = ()

    def __bool__(self) -> bool:
        return bool(self.criteria)

    def __call__(self, text: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's settled length, cut where a criterion holds, and whether one did.

        Args:
            text: int64 `[A, N]`.
            before, after: int64 `[A]`; the tokens between are new and are looked at one by one.
        """
        lengths, halted = after.tolist(), [False] * len(after)
        for row, (old, new) in enumerate(zip(before.tolist(), lengths, strict=True)):
            for length in range(old + 1, new + 1):
                ids = text[row : row + 1, :length]
                if any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in self.criteria):
                    lengths[row], halted[row] = length, True
                    break
        return torch.tensor(lengths, device=text.device), torch.tensor(halted, device=text.device)
