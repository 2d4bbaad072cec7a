"""What every reveal rule keeps to, found by itself, whatever the logits."""

import math
import os
import pkgutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MASK, VOCABULARY, generators, tiny

from hybrid.sampling import reveal
from hybrid.sampling.choosing.choice import Draws, confidence
from hybrid.sampling.options.merge import merge
from hybrid.sampling.options.rule import MEANT
from hybrid.sampling.options.settings import plan_of
from hybrid.sampling.reveal import Canvas, Reveal, options, rules

REMASKING = {"remdm"}
CHOICES = {
    "steps_per_block": st.integers(1, 9), "confidence_threshold": st.floats(0.01, 1),
    "confidence_factor": st.floats(0.1, 4), "entropy_bound": st.floats(0, 3), "remask_strength": st.floats(0, 1),
    "remask": st.sampled_from(["cap", "rescale", "confidence"]), "dream_eps": st.floats(1e-5, 0.9),
    "dream_alg": st.sampled_from(["maskgit_plus", "topk_margin", "entropy"]),
    "noise_schedule": st.sampled_from(["linear", "cosine"]),
}  # fmt: skip


def canvas_of(seed: int, width: int, steps: int) -> tuple[Canvas, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    rows = 3
    hidden = torch.rand(rows, width, generator=source) < 0.8
    given_tokens = torch.randint(0, MASK, (rows, width), generator=source)
    logits = 3 * torch.randn(rows, width, VOCABULARY, generator=source)
    logits[..., MASK] = -torch.inf
    canvas = Canvas(
        tokens=given_tokens.where(~hidden, MASK), hidden=hidden, drafted=torch.zeros_like(hidden),
        confidence=torch.ones(rows, width), guess=logits.argmax(-1), certainty=confidence(logits, logits.argmax(-1)),
        step=torch.zeros(rows, dtype=torch.int64), steps=steps, width=torch.full((rows,), width),
        must=torch.ones(rows, dtype=torch.bool), mask_token_id=MASK,
        draws=Draws(generators(rows, seed)), order=torch.rand(rows, width, dtype=torch.float64, generator=source),
    )  # fmt: skip
    return canvas, logits


def play(rule: Reveal, name: str, seed: int, width: int, steps: int) -> int:
    """Apply a rule until all is shown, new logits every step, and check every step; returns how many there were."""
    canvas, logits = canvas_of(seed, width, steps)
    taken = 0
    while canvas.hidden.any():
        tokens, hidden = rule(canvas, logits)
        shown, again = canvas.hidden & ~hidden, hidden & ~canvas.hidden
        assert (shown.any(1) | ~canvas.hidden.any(1)).all(), "a row with hidden slots shows at least one"
        assert (tokens[shown] != MASK).all(), "the mask token is no answer"
        assert torch.equal(tokens[shown], canvas.guess[shown])
        assert (tokens[hidden] == MASK).all()
        assert not (again & ~canvas.drafted).any(), "what was given is never hidden"
        assert name in REMASKING or not again.any()
        still = ~canvas.hidden & ~again
        assert torch.equal(tokens[still], canvas.tokens[still]), "what is shown is never rewritten"
        taken += 1
        fresh = canvas_of(seed + taken, width, steps)[1]
        guess = fresh.argmax(-1)
        canvas = Canvas(
            tokens=tokens, hidden=hidden, drafted=(canvas.drafted | shown) & ~again,
            confidence=torch.where(shown, canvas.certainty, canvas.confidence), guess=guess,
            certainty=confidence(fresh, guess), step=canvas.step + 1, steps=steps, width=canvas.width,
            must=canvas.must, mask_token_id=MASK, draws=canvas.draws, order=canvas.order,
        )  # fmt: skip
        logits = fresh
    return taken


@pytest.mark.parametrize("name", sorted(rules()))
@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data(), st.integers(0, 10**6), st.integers(1, 9))
def test_every_rule_ends_shows_something_and_rewrites_nothing(
    name: str, data: st.DataObject, seed: int, width: int
) -> None:
    known = {option: data.draw(CHOICES[option]) for option in options(name)}
    steps = int(known.get("steps_per_block", width))  # type: ignore[call-overload]
    taken = play(rules()[name](**known), name, seed, width, steps)
    assert taken <= (steps if name in REMASKING else width)
    if "steps_per_block" in known and name not in ("ancestral", "capped"):  # whose steps are no bound
        assert taken <= steps


def test_the_rules_are_there() -> None:
    assert set(rules()) >= {
        "threshold", "factor", "steps", "random", "margin", "entropy", "leftmost", "entropy_bound", "ancestral",
        "first_hitting", "remdm", "dream", "quota", "capped",
    }  # fmt: skip


def rule_of(stored: dict[str, Any] | None = None, **asked: Any) -> Reveal:
    """The rule that options mean, beside a model's stored ones."""
    model = tiny()
    for name, value in (stored or {}).items():
        setattr(model.generation_config, name, value)
    return plan_of(model.config, merge(model, {"mode": "block", **asked})).reveal


def test_options_name_their_rule() -> None:
    """One that a single rule has names it; one of several means a rule that is written down."""
    shared = {option for name in rules() for option in options(name)
              if sum(option in options(other) for other in rules()) > 1}  # fmt: skip
    assert shared == set(MEANT) and all(option in options(name) for option, name in MEANT.items())
    assert rule_of() is rule_of(reveal="threshold")
    assert rule_of(steps_per_block=3) is rule_of(reveal="steps", steps_per_block=3)
    assert rule_of(entropy_bound=0.3) is rule_of(reveal="entropy_bound", entropy_bound=0.3)
    both: dict[str, Any] = {"steps_per_block": 3, "remask": "rescale"}
    assert rule_of(**both) is rule_of(reveal="remdm", **both)
    # What is stored with a model stays where it goes with what is asked for.
    stored = {"reveal": "margin", "steps_per_block": 2}
    assert rule_of(stored) is rule_of(reveal="margin", steps_per_block=2)
    assert rule_of(stored, steps_per_block=3) is rule_of(reveal="margin", steps_per_block=3)
    assert rule_of(stored, confidence_threshold=0.3) is rule_of(confidence_threshold=0.3)
    assert rule_of({"confidence_threshold": 0.3}, steps_per_block=3) is rule_of(steps_per_block=3)
    assert rule_of({"confidence_threshold": 0.3}) is rule_of(confidence_threshold=0.3)


def test_a_module_that_is_no_rule_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helping.py").write_text("def something_else(): ...\n")
    (tmp_path / "constants.py").write_text("constants = 3\n")
    (tmp_path / "strange.py").write_text("def strange(oddness: float = 0.5): ...\n")
    monkeypatch.setattr(reveal, "__path__", [*reveal.__path__, str(tmp_path)])
    found = rules.__wrapped__()
    for name in ("helping", "constants", "strange"):
        del sys.modules[f"{reveal.__name__}.{name}"]
    assert set(found) - set(rules()) == {"strange"}


def test_a_call_lists_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are found once."""
    model = tiny()

    def run() -> Any:
        return model.generate(torch.tensor([[1, 2]]), mode="block", reveal="margin", max_new_tokens=4)

    want = run()
    for place, name in ((pkgutil, "iter_modules"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(place, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    assert torch.equal(run(), want)


def one_row(probabilities: list[list[float]], steps: int = 4) -> tuple[Canvas, torch.Tensor]:
    logits = torch.tensor([probabilities]).log()
    guess, width = logits.argmax(-1), len(probabilities)
    mask = torch.ones(1, width, dtype=torch.bool)
    zero = torch.zeros(1, width)
    return Canvas(
        tokens=torch.full((1, width), MASK), hidden=mask, drafted=~mask, confidence=zero, guess=guess,
        certainty=confidence(logits, guess), step=torch.zeros(1, dtype=torch.int64), steps=steps,
        width=torch.tensor([width]), must=torch.tensor([True]), mask_token_id=MASK, draws=Draws(generators(1)),
        order=torch.linspace(0, 0.99, width, dtype=torch.float64)[None],
    ), logits  # fmt: skip


LAWS = [[0.6, 0.3, 0.1], [0.5, 0.49, 0.01], [0.55, 0.225, 0.225], [0.9, 0.05, 0.05]]


def shown_by(name: str, laws: list[list[float]] = LAWS, **known: object) -> list[int]:
    canvas, logits = one_row(laws)
    return (~rules()[name](**known)(canvas, logits)[1]).nonzero()[:, 1].tolist()


def test_what_each_rule_shows_by_hand() -> None:
    """Four slots with the best guess at 0.6, 0.5, 0.55, 0.9; margins 0.3, 0.01, 0.325, 0.85; entropies 0.898, 0.742,
    1.000 and 0.394 nats."""
    assert shown_by("steps") == shown_by("margin") == shown_by("entropy") == [3]
    assert shown_by("leftmost") == [0] and shown_by("first_hitting") == [0]
    assert shown_by("threshold", confidence_threshold=0.55) == [0, 2, 3]
    # The second best comes by margin: slot 2 before 0; by entropy: slot 1.
    laws = LAWS[:3]
    assert shown_by("margin", laws) == [2] and shown_by("entropy", laws) == [1] and shown_by("steps", laws) == [0]
    # Rank n while c_n >= 1 - f / (n + 1): 0.9 >= 1/3, 0.6 >= 5/9, 0.55 < 2/3, and then no more.
    assert shown_by("factor", confidence_factor=4 / 3) == [0, 3]
    assert shown_by("factor", confidence_factor=0.1) == [3]
    # Before the second, third and fourth stand 0.394, 1.136 and 2.034 nats.
    assert [shown_by("entropy_bound", entropy_bound=bound) for bound in (0, 0.394, 0.395, 1.14, 2.04)] == [
        [3], [3], [1, 3], [0, 1, 3], [0, 1, 2, 3],
    ]  # fmt: skip
    # What is certain is above no threshold of 1, but at least that; a quota of four slots in four steps is one.
    certain = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], LAWS[0], LAWS[1]]
    assert shown_by("threshold", certain, confidence_threshold=1.0) == [0, 1]
    assert shown_by("quota", certain, confidence_threshold=1.0) == shown_by("quota", certain) == [0]
    assert shown_by("quota", certain, confidence_threshold=0.59) == [0, 1, 2]
    # Half of the window may be shown after two of four steps, a quarter after one.
    assert shown_by("capped", certain, confidence_threshold=0.1) == [0]
    # 0, 1, 1, 2 of four slots in four steps of Dream's, and steps that show nothing are left out.
    assert shown_by("dream", laws=LAWS) == [3] and shown_by("dream", LAWS[:3], dream_alg="topk_margin") == [2]
    # With four steps slots fall due at floor(4 u): 0, 1, 2, 3; with one, all at once.
    assert shown_by("ancestral") == [0]
    canvas, logits = one_row(LAWS, steps=1)
    assert not rules()["ancestral"]()(canvas, logits)[1].any()
    # A cosine has shown cos(3 pi / 8) = 0.38 of all after the first of four steps: those due at 0 and 0.33.
    assert shown_by("ancestral", noise_schedule="cosine") == [0, 1]


@pytest.mark.parametrize(
    ("schedule", "alpha"), [("linear", lambda k: k / 5), ("cosine", lambda k: math.sin(math.pi * k / 10))]
)
@pytest.mark.parametrize("name", ["ancestral", "remdm"])
def test_what_is_shown_by_a_step_is_what_the_schedule_has(name: str, schedule: str, alpha: Any) -> None:
    """Of two thousand slots; ReMDM hides none again here."""
    canvas, logits = one_row([[0.6, 0.3, 0.1]] * 2000, steps=5)
    canvas = replace(canvas, order=torch.rand(1, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    rule = rules()[name](noise_schedule=schedule, **({"remask_strength": 0.0} if name == "remdm" else {}))
    for step in range(1, 6):
        tokens, hidden = rule(canvas, logits)
        assert float((~hidden).float().mean()) == pytest.approx(alpha(step), abs=0.03)
        canvas = replace(canvas, tokens=tokens, hidden=hidden, drafted=~hidden, step=canvas.step + 1)
    assert not canvas.hidden.any()
    with pytest.raises(ValueError, match="schedule is 'sideways'"):
        rules()[name](noise_schedule="sideways")


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_where_everything_is_sure_parallel_greedy_is_sequential_greedy(seed: int, width: int) -> None:
    """Fast-dLLM, theorem 1, on an enumerated joint law of binary slots: if every slot's best token has p > 1 - eps and
    (n + 1) eps <= 1, the best tokens together are what one slot after the other gives."""
    source = torch.Generator().manual_seed(seed)
    joint = torch.rand([2] * width, dtype=torch.float64, generator=source)
    best = tuple(torch.randint(0, 2, (width,), generator=source).tolist())
    joint *= (1 / (width + 1)) / joint.sum()
    joint[best] += 1 - joint.sum()
    marginals = [joint.sum([i for i in range(width) if i != slot]) for slot in range(width)]
    eps = max(1 - float(m.max()) for m in marginals)
    assert (width + 1) * eps <= 1 + 1e-12
    canvas, logits = one_row([m.tolist() for m in marginals])
    assert not rules()["factor"](confidence_factor=1.0)(canvas, logits)[1].any(), "the rule shows all of them"
    for order in torch.randperm(width, generator=source)[None].tolist():
        law, text = joint, {}
        for slot in order:
            rest = [i for i in range(width) if i != slot]
            text[slot] = int(law.sum(rest).argmax())
            keep = torch.zeros(2, dtype=torch.float64)
            keep[text[slot]] = 1
            law = law * keep.view([2 if i == slot else 1 for i in range(width)])
        assert [text[i] for i in range(width)] == canvas.guess[0].tolist()
