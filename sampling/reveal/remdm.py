"""Show, and take back: remasking diffusion, ReMDM (arXiv 2503.00307). Written text can still be revised, which no
purely sequential model can do."""

import torch
from torch import Tensor

from hybrid.common.checks import is_number
from hybrid.noise import revealed
from hybrid.sampling.reveal import Canvas, Reveal, checked_steps

KINDS = ("cap", "rescale", "confidence")


def remdm(
    steps_per_block: int | None = None, remask: str = "cap", remask_strength: float = 0.1,
    noise_schedule: str = "linear",
) -> Reveal:  # fmt: skip
    """`steps_per_block` steps from alpha = 0 (all hidden) to 1, as `noise_schedule` has it, the one of training (see
    `hybrid.noise`); at each, shown drafts are hidden again with probability sigma, and hidden ones are shown with
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). The last step hides nothing and shows all. With
    eta = `remask_strength` and the largest sigma that is possible, s = min(1, (1 - alpha_s) / alpha_t), sigma is

    - "cap": min(eta, s)
    - "rescale": eta s
    - "confidence": eta s, shared out among the shown by softmax(-confidence): what was shown in doubt goes first

    Raises:
        ValueError: an option out of range.
    """
    checked_steps(steps_per_block)
    revealed(noise_schedule, torch.ones(1), 1)  # raises, if it is none
    if remask not in KINDS:
        raise ValueError(f"remask is {remask!r}; use one of {', '.join(map(repr, KINDS))}.")
    if not is_number(remask_strength) or not 0 <= remask_strength <= 1:
        raise ValueError(f"remask_strength is {remask_strength!r}; it must be a number in [0, 1].")

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        step = canvas.step.clamp(max=canvas.steps - 1)[:, None].double()
        now, then = (revealed(noise_schedule, at, canvas.steps) for at in (step, step + 1))  # alpha_t and alpha_s
        most = torch.where(now > 0, (1 - then) / now, 0.0).clamp(max=1)
        sigma = most.clamp(max=remask_strength) if remask == "cap" else remask_strength * most
        share, hidden_sigma = sigma.expand(canvas.hidden.shape), sigma
        if remask == "confidence":
            doubt = (-canvas.confidence.double()).masked_fill(~canvas.drafted, -torch.inf)
            share, hidden_sigma = sigma * doubt.softmax(1).nan_to_num(0.0), torch.zeros_like(sigma)
        chance = (then - (1 - hidden_sigma) * now) / (1 - now)
        drawn = canvas.draws.uniform(canvas.hidden | canvas.drafted)
        # Somebody is always shown: where chance has nobody, whoever came closest.
        closest = canvas.rank(-drawn) == 0
        return canvas.show((drawn < chance) | closest, hide=drawn < share)

    reveal.remasks = True  # type: ignore[attr-defined]
    return reveal
