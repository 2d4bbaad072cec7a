"""What a request is told of how likely its tokens were: when they were revealed, and those of its prompt."""

import pytest
import torch
from arrivals import MODES, PLENTY, company, model_for
from oracles import MASK, texts, tiny
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.sampling import Done, Request, Session

PROMPT = texts(5, [11])[0]


def left_to_right(model: HybridForCausalLM, ids: list[int]) -> Tensor:
    """Log-probabilities `[T-1, V]` of what follows each token, by one forward over all of them."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    logits[:, MASK] = -torch.inf
    return logits.log_softmax(-1)


def ended(session: Session) -> dict[int, Done]:
    found = {}
    while session.active or session.waiting:
        found |= {done.index: done for done in session.step()}
    return found


@pytest.mark.parametrize("prefill", [None, 1, 4])
@pytest.mark.parametrize("mode", ["ar", "block", "diffusion", "speculative"])
def test_a_prompt_is_scored_as_one_forward_scores_it(mode: str, prefill: int | None) -> None:
    model = model_for("causal", "in_place")
    session = Session(model, slots=3, prefill=prefill, budget=PLENTY, mode=mode)
    for length in (1, 6, 11):
        session.admit(Request(PROMPT[:length], likeliest=3, score_prompt=True, max_new_tokens=0))
    session.admit(Request(PROMPT, likeliest=3, score_prompt=True, max_new_tokens=5))
    for index, done in ended(session).items():
        ids = PROMPT[: (1, 6, 11, 11)[index]]
        assert done.error is None and len(done.tokens) == done.stats.tokens == (5 if index == 3 else 0)
        right, found = left_to_right(model, ids), done.prompt_chances
        assert found is not None and len(found) == len(ids) - 1
        for law, token, chance in zip(right, ids[1:], found, strict=True):
            assert chance.log_prob == pytest.approx(float(law[token]), abs=1e-5)
            best = law.topk(3)
            assert [token for token, _ in chance.likeliest] == best.indices.tolist()
            assert [log for _, log in chance.likeliest] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("mode", MODES["causal"])
def test_new_tokens_are_told_with_the_law_that_revealed_them(mode: str) -> None:
    session = Session(model_for("causal", "in_place"), slots=3, budget=PLENTY)
    asks, told = company(mode, output_scores=True), list[float]()
    for ask in asks:
        watchers = [lambda steps: told.extend(chance.log_prob for step in steps for chance in step.chances)]
        session.admit(Request(ask.ids, seed=ask.seed, likeliest=2, watchers=watchers, **ask.options))
    count, found = 0, ended(session)
    for index, done in found.items():
        ask, chances = asks[index], done.chances
        assert chances is not None and done.prompt_chances is None
        new = ask.ids.count(MASK) if mode == "infill" else len(done.tokens)
        assert len(chances) == new > 0
        if done.log_probs is not None and mode != "infill":
            assert [chance.log_prob for chance in chances] == pytest.approx(done.log_probs, abs=1e-5)
        assert all(chance.likeliest[0][1] >= chance.log_prob - 1e-6 for chance in chances)
        count += new
    assert len(told) == count
    plain = Session(model_for("causal", "in_place"), slots=2, budget=PLENTY)
    for ask in company(mode):
        plain.admit(ask.request)
    for index, done in ended(plain).items():
        assert done.tokens == found[index].tokens and done.chances is None


def test_what_reads_no_prompt_from_left_to_right_says_so() -> None:
    for clean, mode in (("block", "block"), ("block", "ar"), ("full", "diffusion")):
        session = Session(tiny(clean_attention=clean), slots=1, budget=PLENTY, mode=mode)
        with pytest.raises(ValueError, match="score_prompt"):
            session.admit(Request(PROMPT, likeliest=0, score_prompt=True, max_new_tokens=2))
    session = Session(tiny(), slots=1, budget=PLENTY)
    for given in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match="likeliest"):
            session.admit(Request(PROMPT, likeliest=given, score_prompt=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_new_tokens"):
        session.admit(Request(PROMPT, likeliest=0, max_new_tokens=0))


def test_tokens_are_counted_while_they_come() -> None:
    session = Session(tiny(), slots=2, budget=PLENTY)
    for count in (3, 5):
        session.admit(Request(PROMPT, max_new_tokens=count, eos_token_id=[]))
    assert session.check(Request(PROMPT, mode="block")).mode == "block" and session.count == 2
    seen = []
    while session.active or session.waiting:
        session.step()
        seen.append(session.tokens)
    assert seen == sorted(seen) and seen[-1] == 8 and len(set(seen)) > 2
