"""Show what Dream's sampler shows at each of its steps (arXiv 2508.15487; the code that comes with its weights)."""

import functools

import torch
from torch import Tensor

from hybrid.common.checks import is_number
from hybrid.sampling.reveal import Canvas, Reveal, checked_steps, entropies, margins

ALGORITHMS = ("maskgit_plus", "topk_margin", "entropy")


def dream(steps_per_block: int | None = None, dream_eps: float = 1e-3, dream_alg: str = "entropy") -> Reveal:
    """Times fall evenly from 1 to `dream_eps` in `steps_per_block` steps; a step from t to s shows the share 1 - s/t of
    what is hidden, rounded down, and the last one all. So little comes first and most last, and steps that show
    nothing cost no forward. What comes first is said by `dream_alg`: the surest guess ("maskgit_plus"), the clearest
    decision ("topk_margin") or the least uncertain slot ("entropy"). Dream's "origin" is reveal="ancestral".

    Raises:
        ValueError: an option out of range.
    """
    checked_steps(steps_per_block)
    if not is_number(dream_eps) or not 0 < dream_eps < 1:
        raise ValueError(f"dream_eps is {dream_eps!r}; it must be a number in (0, 1): from time 0 no share is defined.")
    if dream_alg not in ALGORITHMS:
        raise ValueError(f"dream_alg is {dream_alg!r}; use one of {', '.join(map(repr, ALGORITHMS))}.")

    def reveal(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        at_first = (canvas.hidden | canvas.drafted).sum(1).tolist()
        plans = [quotas(count, canvas.steps, dream_eps) for count in at_first]
        due = [plan[step] if step + 1 < len(plan) else count
               for count, plan, step in zip(at_first, plans, canvas.step.tolist(), strict=True)]  # fmt: skip
        score = canvas.certainty
        if dream_alg != "maskgit_plus":
            score = margins(logits) if dream_alg == "topk_margin" else -entropies(logits)
        return canvas.show(canvas.rank(score) < torch.tensor(due, device=score.device)[:, None])

    return reveal


@functools.lru_cache(1024)
def quotas(hidden: int, steps: int, eps: float) -> tuple[int, ...]:
    """How many slots each step shows that shows any. In float32, as theirs: it decides what is rounded down."""
    times, found = torch.linspace(1, eps, steps + 1, dtype=torch.float32), []
    for share in (1 - times[1:] / times[:-1])[:-1]:
        found.append(int(hidden * share))
        hidden -= found[-1]
    return tuple(count for count in (*found, hidden) if count)
