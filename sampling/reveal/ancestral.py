"""Show each slot at a random one of many steps: ancestral sampling of the masked diffusion (MDLM, arXiv 2406.07524)."""

import torch
from torch import Tensor

from hybrid.noise import revealed
from hybrid.sampling.reveal import Canvas, Reveal, checked_steps


def ancestral(steps_per_block: int | None = None, noise_schedule: str = "linear") -> Reveal:
    """With `steps_per_block` steps every slot's step is independent, and drawn by `noise_schedule`, the one of training
    (see `hybrid.noise`): uniform if it is linear. Steps that show nothing cost no forward, so many steps cost little
    more than the slots there are.

    With sampling at temperature 1 and ever more steps the law is the model's own.

    Raises:
        ValueError: fewer than one step, or no such schedule.
    """
    checked_steps(steps_per_block)
    revealed(noise_schedule, torch.ones(1), 1)  # raises, if it is none

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        ends = revealed(noise_schedule, torch.arange(1, canvas.steps + 1, device=canvas.order.device), canvas.steps)
        due = torch.searchsorted(ends, canvas.order, right=True).masked_fill(~canvas.hidden, canvas.steps)
        return canvas.show(due == due.amin(1, keepdim=True))

    reveal.in_order = True  # type: ignore[attr-defined]
    return reveal
