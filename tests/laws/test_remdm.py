"""ReMDM's remasking (arXiv 2503.00307, section 4): how likely each slot is shown or hidden again at each step, and the
law of a whole window, against enumeration; and that a wrong kind would be noticed."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hybrid.sampling.reveal import Canvas, rule

SLOTS, STEPS, ROWS = 3, 5, 60_000
SURE = (0.9, 0.2, 0.6)  # the model's confidence in each slot's guess
KINDS = ("cap", "rescale", "confidence")
State = tuple[bool, ...]  # which slots are hidden


class Uniform:
    """Draws of all rows at once."""

    def __init__(self, seed: int) -> None:
        self.source = torch.Generator().manual_seed(seed)

    def uniform(self, wanted: Tensor) -> Tensor:
        drawn = torch.rand(wanted.shape, dtype=torch.float64, generator=self.source)
        return drawn.where(wanted, 0.0)


# --- As the paper has it ----------------------------------------------------------------------------------


def sigma(kind: str, step: int, eta: float) -> float:
    """With alpha, the share that is shown, going evenly from 0 to 1. Equations 8 and 9 there: the cap, and the
    rescaled schedule; the confidence-based one starts from the latter."""
    alpha_t, alpha_s = step / STEPS, (step + 1) / STEPS
    largest = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 0.0
    return min(eta, largest) if kind == "cap" else eta * largest


def again(kind: str, step: int, eta: float, hidden: State) -> list[float]:
    """How likely each slot that is shown is hidden again."""
    shown = [i for i in range(SLOTS) if not hidden[i]]
    share = sigma(kind, step, eta)
    if kind != "confidence":
        return [0.0 if hidden[i] else share for i in range(SLOTS)]
    weights = [math.exp(-SURE[i]) for i in range(SLOTS)]
    return [0.0 if hidden[i] else share * weights[i] / sum(weights[j] for j in shown) for i in range(SLOTS)]


def shown_now(kind: str, step: int, eta: float) -> float:
    """How likely a hidden slot is shown: (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t)."""
    alpha_t, alpha_s = step / STEPS, (step + 1) / STEPS
    share = 0.0 if kind == "confidence" else sigma(kind, step, eta)
    return (alpha_s - (1 - share) * alpha_t) / (1 - alpha_t)


def after(kind: str, step: int, eta: float, hidden: State) -> dict[State, float]:
    """Every state that may follow. Somebody is always shown here: where chance has nobody, one of the hidden."""
    back, chance = again(kind, step, eta, hidden), shown_now(kind, step, eta)
    masked = [i for i in range(SLOTS) if hidden[i]]
    found: dict[State, float] = defaultdict(float)
    for next_ in itertools.product([False, True], repeat=SLOTS):
        taken = math.prod(back[i] if next_[i] else 1 - back[i] for i in range(SLOTS) if not hidden[i])
        fresh = math.prod(1 - chance if next_[i] else chance for i in masked)
        if masked and all(next_[i] for i in masked):
            for one in masked:
                found[tuple(next_[i] and i != one for i in range(SLOTS))] += taken * fresh / len(masked)
        else:
            found[next_] += taken * fresh
    return found


# --- As the rule does it ----------------------------------------------------------------------------------


def one_step(kind: str, step: int, eta: float, hidden: Tensor, draws: Uniform) -> Tensor:
    tokens = torch.full(hidden.shape, 9).where(hidden, torch.arange(SLOTS))
    canvas = Canvas(
        must=torch.ones(len(hidden), dtype=torch.bool),
        tokens=tokens, hidden=hidden, drafted=~hidden, confidence=torch.tensor(SURE).expand_as(hidden),
        guess=torch.arange(SLOTS).expand_as(hidden), certainty=torch.tensor(SURE).expand_as(hidden),
        step=torch.full((len(hidden),), step), steps=STEPS, width=torch.full((len(hidden),), SLOTS),
        order=torch.zeros(hidden.shape, dtype=torch.float64), draws=cast(Any, draws), mask_token_id=9,
    )  # fmt: skip
    made, left = rule("remdm", steps_per_block=STEPS, remask=kind, remask_strength=eta)(canvas, torch.zeros(1, 1, 1))
    assert (made[left] == 9).all() and (made[~left] == torch.arange(SLOTS).expand_as(made)[~left]).all()
    return left


def counted(states: Tensor) -> dict[State, float]:
    counts = (states.long() * 2 ** torch.arange(SLOTS)).sum(1).bincount(minlength=2**SLOTS).tolist()
    every = [tuple(bool(number >> i & 1) for i in range(SLOTS)) for number in range(2**SLOTS)]
    return {state: count / len(states) for state, count in zip(every, counts, strict=True) if count}


def fits(got: Mapping[State, float], want: Mapping[State, float]) -> bool:
    """Within five standard errors everywhere; what cannot be never is."""
    for state in {*got, *want}:
        chance = want.get(state, 0.0)
        if abs(got.get(state, 0.0) - chance) > 5 * math.sqrt(max(chance * (1 - chance), 0.0) / ROWS) + 1e-12:
            return False
    return True


STATES: Sequence[State] = [s for s in itertools.product([False, True], repeat=SLOTS) if any(s)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.1, 0.4, 1.0])
def test_each_step_is_the_papers(kind: str, eta: float) -> None:
    told_apart = dict.fromkeys([*KINDS, "largest"], 0)
    for step, hidden in itertools.product(range(STEPS), STATES):
        if step == 0 and not all(hidden):
            continue
        got = counted(one_step(kind, step, eta, torch.tensor(hidden).expand(ROWS, -1), Uniform(step)))
        assert fits(got, after(kind, step, eta, hidden)), (step, hidden)
        for other in KINDS:  # the failing control
            told_apart[other] += not fits(got, after(other, step, eta, hidden))
        told_apart["largest"] += not fits(got, after("rescale", step, 1.0, hidden))
    assert told_apart[kind] == 0
    for other in KINDS:
        same = {kind, other} == {"cap", "rescale"} and eta == 1.0  # both are then the largest that there is
        assert (told_apart[other] > 0) == (other != kind and not same)
    assert (told_apart["largest"] > 0) == (kind == "confidence" or eta < 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_a_whole_window_has_the_papers_law(kind: str, eta: float) -> None:
    """From all hidden to nothing hidden, which is where it ends."""
    law, states, draws = {(True,) * SLOTS: 1.0}, torch.ones(ROWS, SLOTS, dtype=torch.bool), Uniform(7)
    for step in range(STEPS):
        following: dict[State, float] = defaultdict(float)
        for state, share in law.items():
            for next_, chance in after(kind, step, eta, state).items() if any(state) else [(state, 1.0)]:
                following[next_] += share * chance
        law = following
        open_ = states.any(1)  # a window that is full is drafted no more
        states[open_] = one_step(kind, step, eta, states[open_], draws)
        assert sum(law.values()) == pytest.approx(1) and fits(counted(states), law)
        for slot in range(SLOTS):  # marginals
            want = sum(share for state, share in law.items() if state[slot])
            assert states[:, slot].double().mean().item() == pytest.approx(want, abs=5 * math.sqrt(0.25 / ROWS))
    assert law[(False,) * SLOTS] == pytest.approx(1) and not states.any()
