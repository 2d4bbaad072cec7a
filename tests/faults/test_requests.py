"""What is wrong with a request, or is taken back, leaves the others alone."""

import itertools
import queue
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from arrivals import (
    MODES,
    PLENTY,
    VICTIM,
    Ask,
    Broken,
    alone,
    company,
    each_alone,
    in_company,
    ledger,
    model_for,
    together,
)
from oracles import MASK, texts
from torch import Tensor

import hybrid.sampling.schemes as schemes
from hybrid.sampling import Canvas, Done, Request, Session, Step, decode, decode_all

every_mode = pytest.mark.parametrize("mode", MODES["causal"])


@every_mode
@pytest.mark.parametrize("when", ["waiting", "prompt", "under way"])
def test_who_is_taken_back_leaves_the_others_alone(mode: str, when: str) -> None:
    asks = company(mode)
    session = Session(model_for("causal", "in_place"), slots=1 if when == "waiting" else 3, prefill=2, budget=PLENTY)
    numbers = [session.admit(ask.request) for ask in asks]
    row, found = session._known[numbers[VICTIM]], dict[int, Done]()

    def now() -> bool:
        if when == "waiting":
            return session.active == 1 and row.place < 0
        if when == "prompt":
            return 0 < row.start < row.target
        return row.length > row.prompt + (mode not in ("diffusion", "infill"))

    while session.active or session.waiting:
        for done in session.step():
            found[done.index] = done
        if VICTIM not in found and now():
            there = session.active + session.waiting
            found[VICTIM] = session.cancel(numbers[VICTIM])
            assert session.active + session.waiting == there - 1
            with pytest.raises(ValueError, match="index"):
                session.cancel(numbers[VICTIM])
    for i, (text, cost) in enumerate(each_alone(mode)):
        if i != VICTIM:
            assert (found[i].tokens, ledger(found[i].stats)) == (text, cost)
        else:
            known = row.prompt if mode == "infill" else 0  # of which the result has the prompt as well
            assert found[i].tokens == text[: len(found[i].tokens)] and len(found[i].tokens) < len(text)
            assert (len(found[i].tokens) > known) == (found[i].stats.tokens > 0) == (when == "under way")
            assert (found[i].stats.prefill > 0) == (when != "waiting")


HANDED_IN = [
    *itertools.product(MODES["causal"], ["logits_processor", "watchers", "streamer"]),
    *itertools.product(("ar", "block", "diffusion", "speculative"), ["stopping_criteria"]),
    *itertools.product(("block", "diffusion", "infill"), ["reveal"]),
]


@pytest.mark.parametrize(("mode", "what"), HANDED_IN)
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_what_fails_ends_its_own_request(mode: str, what: str, fails_at: int) -> None:
    broken = Broken(fails_at)
    done = in_company(mode, **broken.options(what))
    assert broken.left <= 0 and done.error is broken.error
    if what == "streamer":
        assert broken.ended == 1
    if what not in ("streamer", "watchers"):  # which are told of what is settled already
        assert len(done.tokens) < 17


def test_the_end_of_a_streamer_may_fail_too() -> None:
    right = Broken(-1)
    in_company("ar", streamer=right)
    broken = Broken(-right.left - 1)
    done = in_company("ar", streamer=broken)
    assert done.error is broken.error and len(done.tokens) == 17


def forbid_all(ids: Tensor, scores: Tensor) -> Tensor:
    return torch.full_like(scores, -torch.inf)


def no_numbers(ids: Tensor, scores: Tensor) -> Tensor:
    return torch.full_like(scores, torch.nan)


@every_mode
@pytest.mark.parametrize(
    "options", [{"logits_processor": [forbid_all]}, {"logits_processor": [no_numbers]}, {"temperature": 1e-320}]
)
def test_where_no_token_can_be_drawn_one_request_ends(mode: str, options: dict[str, Any]) -> None:
    assert "no token could be drawn" in str(in_company(mode, **options).error)


@pytest.mark.parametrize("fused", [False, True])
def test_nor_while_drafts_are_verified(fused: bool) -> None:
    """Where what follows them is forbidden."""
    ids = texts(2, [5])[0]

    def forbid_far(history: Tensor, scores: Tensor) -> Tensor:
        return forbid_all(history, scores) if history.shape[1] == len(ids) + 2 else scores

    options: dict[str, Any] = {"mode": "speculative", "fused": fused, "max_new_tokens": 12, "temperature": 0.3}
    verified = 0
    for seed in range(12):
        asks = [Ask(ids=ids, options=options | {"do_sample": True}, seed=seed) for _ in range(2)]
        asks[1].options["logits_processor"] = [forbid_far]
        found = together(Session(model_for("causal", "in_place"), slots=2, budget=PLENTY), asks)
        assert found[0].tokens == alone(model_for("causal", "in_place"), asks[0])[0]
        assert "no token could be drawn" in str(found[1].error)
        verified += found[1].stats.accepted[-1:] == [2]  # a draft was kept, and nothing could follow it
    assert verified


@pytest.mark.parametrize("mode", ["block", "diffusion", "infill"])
@pytest.mark.parametrize(
    "broken",
    [
        lambda tokens, hidden: (tokens[:, :1], hidden[:, :1]),
        lambda tokens, hidden: (tokens + 1000, hidden),
        lambda tokens, hidden: (tokens - 1000, hidden),
        lambda tokens, hidden: (tokens.float(), hidden),
        lambda tokens, hidden: (tokens, hidden.int()),
        lambda tokens, hidden: None,
    ],
    ids=["of another size", "beyond the vocabulary", "before it", "no ids", "no flags", "nothing"],
)
def test_a_rule_that_shows_no_tokens_ends_its_own_request(mode: str, broken: Any) -> None:
    def rule(canvas: Canvas, logits: Tensor) -> Any:
        return broken(*canvas.show(canvas.rank(canvas.certainty) == 0))

    done = in_company(mode, reveal=rule)
    assert isinstance(done.error, ValueError) and "reveal: the rule" in str(done.error)


def test_a_shared_rule_ends_those_for_which_it_fails() -> None:
    """Which is found out without a draw more for anybody else."""
    model = model_for("causal", "in_place")

    def rule(canvas: Canvas, logits: Tensor) -> tuple[Tensor, Tensor]:
        drawn = canvas.draws.uniform(canvas.hidden)
        if (canvas.tokens == bad).any():
            raise RuntimeError("a user's mistake")
        return canvas.show(canvas.rank(drawn) == 0)

    bad = -1
    options = {"mode": "block", "reveal": rule, "do_sample": True, "max_new_tokens": 12}
    asks = [Ask(ids=prompt, options=options, seed=i) for i, prompt in enumerate(texts(1, [5, 5, 4]))]
    right = [alone(model, ask)[0] for ask in asks]
    bad = next(token for token in right[1] if token not in right[0] + right[2])
    found = together(Session(model, slots=3, budget=PLENTY), asks)
    assert [done.tokens for done in found] == [right[0], found[1].tokens, right[2]]
    assert str(found[1].error) == "a user's mistake" and found[0].error is found[2].error is None


@pytest.mark.parametrize("ends", [False, True])
def test_a_watcher_may_take_out_whom_it_likes(ends: bool) -> None:
    """Its own request, also when that has just ended, or another one."""
    asks, taken = company("ar"), dict[int, Done]()

    def watch(steps: Sequence[Step]) -> None:
        position = len(asks[VICTIM].ids) + (16 if ends else 5)
        if steps[0].position == position:
            taken[VICTIM] = session.cancel(VICTIM)
            if not ends:
                taken[2] = session.cancel(2)

    asks[VICTIM].options["watchers"] = [watch]
    session, found = Session(model_for("causal", "in_place"), slots=3, budget=PLENTY), dict[int, Done]()
    for ask in asks:
        session.admit(ask.request)
    while session.active or session.waiting:
        found |= {done.index: done for done in session.step()}
    assert sorted([*found, *taken]) == [0, 1, 2, 3]
    for i, done in {**found, **taken}.items():
        text, _ = each_alone("ar")[i]
        assert done.tokens == (text[: len(done.tokens)] if i in taken else text) and done.error is None
    assert len(taken[VICTIM].tokens) == (17 if ends else 6)


class Told:
    """A streamer that writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def put(self, tokens: Tensor) -> None:
        self.said.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.said.append("end")


def test_nothing_is_put_into_the_stream_of_who_is_taken_out() -> None:
    """Not even what the forward said after which somebody else's watcher takes the request out."""
    told = [Told(), Told()]

    def watch(steps: Sequence[Step]) -> None:
        if steps[0].forward == 3:
            taken.append(session.cancel(1))

    taken = list[Done]()
    session = Session(model_for("causal", "in_place"), slots=2, mode="ar", max_new_tokens=6, budget=PLENTY)
    session.admit(Request([4], streamer=told[0], watchers=[watch]))
    session.admit(Request([5], streamer=told[1]))
    while session.active or session.waiting:
        session.step()
    assert told[1].said == [[5], *[[token] for token in taken[0].tokens], "end"] and len(taken[0].tokens) == 3


def test_a_request_that_stays_outside_is_not_streamed() -> None:
    told = Told()
    session = Session(model_for("causal", "in_place"), slots=2, mode="ar", max_new_tokens=2, budget=40)
    session.check(Request([4], streamer=told))
    with pytest.raises(ValueError, match="budget"):
        session.admit(Request([4] * 50, streamer=told))
    assert not told.said
    session.admit(Request([4], streamer=told))
    (done,) = [done for _ in range(2) for done in session.step()]
    assert told.said == [[4], *[[token] for token in done.tokens], "end"]


def test_the_ledger_of_a_session_can_be_read_at_any_time() -> None:
    session = Session(model_for("causal", "in_place"), slots=2, mode="ar")
    assert "0 tokens" in str(session.stats)
    session.admit([1])
    session.step()
    assert "1 prefill" in str(session.stats)


@pytest.mark.parametrize("act", ["cancel", "step"])
def test_nobody_acts_while_a_forward_is_under_way(act: str) -> None:
    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        session.cancel(0) if act == "cancel" else session.step()
        return scores

    session = Session(model_for("causal", "in_place"), slots=4, budget=PLENTY)
    found = together(session, company("ar", logits_processor=[processor]))
    assert isinstance(found[VICTIM].error, ValueError) and "under way" in str(found[VICTIM].error)
    for i in (0, 2, 3):
        assert found[i].tokens == each_alone("ar")[i][0]


# --- Who is not let in ----------------------------------------------------------------------------

BLOCK = {"mode": "block"}
GAP = {"mode": "infill"}
REFUSED: list[tuple[Any, str]] = [
    ([], "ids is empty"),
    ("abc", "ids is a str"),
    (None, "ids is a NoneType"),
    ([1.0], "ids is a list"),
    (torch.ones(2, 2, dtype=torch.int64), "ids is a Tensor"),
    ([1, 24], r"ids\[1\] is 24"),
    ([-1], r"ids\[0\] is -1"),
    ([1, MASK], "mask token"),
    ([1] * 256, "256 tokens.*max_position_embeddings"),
    (Request([1] * 200, max_new_tokens=57), "max_new_tokens is 57.*256"),
    (Request([1] * 60, max_new_tokens=60), "ids: 60 tokens and up to 60 new ones.*budget is 100"),
    (Request([1], max_new_tokens=0), "max_new_tokens"),
    (Request([1], max_length="2"), "max_length"),
    (Request([1, 2], max_length=2), "max_length"),
    (Request([1], mode="fast"), "mode"),
    (Request([1], nonsense=1), "nonsense"),
    (Request([1], temperature=-1.0), "temperature"),
    (Request([1], temperature=0.5, do_sample=False), "temperature"),
    (Request([1], eos_token_id="a"), "eos_token_id"),
    (Request([1], seed=2**80), "seed"),
    (Request([1], seed=True), "seed"),
    (Request([1], seed=1, generator=torch.Generator()), "seed"),
    (Request([1], generator=1), "generator"),
    (Request([1], watchers=print), "watchers"),
    (Request([1], streamer=print), "streamer"),
    (Request([1], stop_strings=["a"]), "stop_strings"),
    (Request([1], stop_strings=["a"], tokenizer=1), "stop_strings"),
    (Request([1], stop_strings=5, tokenizer=1), "stop_strings"),
    (Request([1], num_return_sequences=2), "num_return_sequences"),
    (Request([1], draft_adapter="x"), "draft_adapter"),
    (Request([1], use_cache=False), "use_cache"),
    (Request([1], num_beams=2), "num_beams"),
    (Request([1], cache="dual", **BLOCK), "cache"),
    (Request([1], reveal=["margin"], **BLOCK), "reveal"),
    (Request([1], scheme=schemes.Ar, **BLOCK), "scheme.*Windows"),
    (Request([1], scheme="Ar"), "scheme"),
    (Request([1], **GAP), "no mask token"),
    (Request([MASK] * 257, **GAP), "257 tokens.*256"),
    (Request([1, MASK], max_new_tokens=1, **GAP), "max_new_tokens"),
    (Request([1, MASK], stopping_criteria=[print], **GAP), "stopping_criteria"),
]


@pytest.mark.parametrize(("request_", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_who_is_refused_is_told_why_and_leaves_nothing(request_: Any, message: str) -> None:
    session = Session(model_for("causal", "in_place"), slots=2, budget=100)
    with pytest.raises(ValueError, match=message):
        session.admit(request_)
    assert (session.waiting, session.active, session.count, session._known) == (0, 0, 0, {})


def test_decode_names_the_request_and_gives_back_those_before_it() -> None:
    model, read = model_for("causal", "in_place"), []

    def source() -> Iterator[list[int]]:
        for ids in ([1], [2], [3], [4, MASK], [5]):
            assert len(read) <= len(found) + 2  # of what is endless no more is read than has a place
            read.append(ids)
            yield ids

    found: list[Done] = []
    results = decode(model, source(), slots=2, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"^request 3: .*mask token"):
        for done in results:
            found.append(done)
    assert sorted(done.index for done in found) == [0, 1, 2]
    assert all(len(done.tokens) == 3 for done in found) and read[-1] == [4, MASK]
    with pytest.raises(ValueError, match="request 1"):
        decode_all(model, [[1], []], max_new_tokens=3)


@pytest.mark.parametrize("error", [ValueError("no more"), KeyError("x"), StopAsyncIteration()])
def test_an_error_of_what_gives_requests_is_no_refusal(error: Exception) -> None:
    def source() -> Iterator[list[int]]:
        yield [1]
        raise error

    with pytest.raises(type(error)) as raised:
        list(decode(model_for("causal", "in_place"), source(), slots=2, max_new_tokens=3))
    assert raised.value is error


def test_decode_all_says_what_failed_and_keeps_the_order() -> None:
    model, told = model_for("causal", "in_place"), list[int]()
    asks = [Request([i], max_new_tokens=9 - 2 * i) for i in range(4)]
    found, stats = decode_all(model, asks, slots=2, on_done=lambda done: told.append(done.index))
    assert [done.index for done in found] == [0, 1, 2, 3] != told and sorted(told) == [0, 1, 2, 3]
    assert stats.tokens == 9 + 7 + 5 + 3 and stats.rows == [done.stats for done in found]
    broken = Broken(2)
    with pytest.raises(RuntimeError) as raised:
        decode_all(model, [[1], Request([2], **broken.options("logits_processor"))], max_new_tokens=5)
    assert raised.value is broken.error


@pytest.mark.parametrize("queue_size", [0, 1, 3])
def test_only_so_many_wait(queue_size: int) -> None:
    """Beside those that have a place, or will have one at the next step."""
    session = Session(model_for("causal", "in_place"), slots=2, queue_size=queue_size, max_new_tokens=5)
    for _ in range(2 + queue_size):
        session.admit([1])
    for _ in range(3):
        with pytest.raises(queue.Full, match="queue_size"):
            session.admit([1])
        assert session.step() == []
        assert (session.active, session.waiting, session.free) == (2, queue_size, -queue_size)
    while not session.step():
        pass
    session.admit([1])
    session.admit([1])
    with pytest.raises(queue.Full):
        session.admit([1])


@pytest.mark.parametrize(
    "options",
    [
        {"slots": 0}, {"slots": None}, {"slots": True}, {"budget": 0}, {"prefill": 0}, {"queue_size": -1},
        {"mode": "fast"}, {"mode": "block", "block_size": 0}, {"mode": "ar", "fused": True}, {"draft_adapter": "no"},
        {"nonsense": 3}, {"mode": "auto", "auto_allow": "block"}, {"mode": "auto", "block_size": 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_session_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=[*options][-1]):
        Session(model_for("causal", "in_place"), **options)
    with pytest.raises(ValueError, match=[*options][-1]):
        decode(model_for("causal", "in_place"), [], **options)
