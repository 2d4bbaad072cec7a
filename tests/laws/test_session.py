"""What a text gets does not depend on the others, whoever comes, waits, fails or leaves."""

import copy
import functools
import gc
import importlib
import itertools
import pkgutil
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from arrivals import (
    PLENTY,
    Ask,
    Crowd,
    adapter_of,
    alone,
    ask_of,
    check,
    crowd_of,
    ledger,
    model_for,
    most_needed,
    together,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import COMBINATIONS, MASK, continuations, padded, texts, tiny
from torch import Tensor

import hybrid.sampling
import hybrid.sampling.batch as batches
import hybrid.sampling.choice as choice
import hybrid.sampling.draft as draft
import hybrid.sampling.request as requests
import hybrid.sampling.schemes as schemes
from hybrid import HybridForCausalLM, KVCache, Layout
from hybrid.flat import Flat
from hybrid.sampling import Canvas, Done, Request, Session, Step, decode, decode_all, shapes
from hybrid.sampling.batch import Batch
from hybrid.sampling.row import Row
from hybrid.sampling.window import Window

MODES: dict[str, tuple[str, ...]] = {
    "causal": ("ar", "block", "diffusion", "speculative", "infill"),
    "block": ("block", "diffusion", "infill"),
    "full": ("block", "diffusion", "infill"),
}
KINDS = [(clean, prediction) for clean in MODES for prediction in ("in_place", "next")]

every_kind = pytest.mark.parametrize(("clean", "prediction"), KINDS)
every_mode = pytest.mark.parametrize("mode", MODES["causal"])


# --- Alone and in company -------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "clean", "prediction"), [*COMBINATIONS, *(("infill", *kind) for kind in KINDS)])
@settings(derandomize=True, max_examples=12)
@given(random=st.randoms(use_true_random=False))
def test_a_text_is_the_same_whoever_else_is_there(mode: str, clean: str, prediction: str, random: Random) -> None:
    """Whoever arrives when, with other lengths, ends, seeds, rules and processors, and whoever is taken back."""
    check(model_for(clean, prediction), crowd_of([mode], clean, random))


@every_kind
@settings(derandomize=True, max_examples=12)
@given(random=st.randoms(use_true_random=False))
def test_and_whatever_their_modes(clean: str, prediction: str, random: Random) -> None:
    check(model_for(clean, prediction), crowd_of(MODES[clean], clean, random))


def keep_what_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes next begins with what is left of the one before."""
    monkeypatch.setattr(KVCache, "release", lambda cache, row: None)


def see_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind a row's slots keeps its document."""
    right = KVCache.open

    def wrong(cache: KVCache, layout: Layout, ids: Tensor) -> Layout:
        cache.reserve(max(cache.lengths) + ids.shape[1])
        before = cache.labels.clone()
        seen = right(cache, layout, ids)
        doc = seen.labels[3]
        old = before[3, cache.first : cache.first + len(doc), : doc.shape[1]]
        doc.copy_(torch.where(doc < 0, old, doc))
        return seen

    monkeypatch.setattr(KVCache, "open", wrong)


def swap_only_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows change places, and leave their values."""
    right = KVCache.swap

    def wrong(cache: KVCache, one: int, other: int) -> None:
        values = cache.values.clone()
        right(cache, one, other)
        cache.values.copy_(values)

    monkeypatch.setattr(KVCache, "swap", wrong)


def commit_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row keeps as many tokens as its neighbour should."""
    right = KVCache.commit

    def wrong(cache: KVCache, n: int | Sequence[int]) -> None:
        right(cache, n if isinstance(n, int) else [*n[1:], n[0]])

    monkeypatch.setattr(KVCache, "commit", wrong)


def pad_over_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding falls on the last token of the longest row."""
    right = KVCache.focus

    def wrong(cache: KVCache, first: int, active: int, end: int | None = None) -> None:
        right(cache, first, active, None if end is None else end - 1)

    monkeypatch.setattr(KVCache, "focus", wrong)


def draw_from_the_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    right = choice.choose

    def wrong(rows: Sequence[Row], counts: Sequence[int], logits: Tensor) -> Any:
        own = [row.generator for row in rows]
        for row, other in zip(rows, [*own[1:], own[0]], strict=True):
            row.generator = other
        found = right(rows, counts, logits)
        for row, generator in zip(rows, own, strict=True):
            row.generator = generator
        return found

    for module in (schemes, draft):
        monkeypatch.setattr(module, "choose", wrong)


def draw_for_all_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that draw lots do so with the first row's generator."""
    monkeypatch.setattr(draft, "Draws", lambda sources: choice.Draws([sources[0]] * len(sources)))


def judge_by_the_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors are given another row's text."""
    right = choice.judged

    def wrong(rows: Sequence[Row], ends: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
        own = [row.processors for row in rows]
        for row, other in zip(rows, [*own[1:], own[0]], strict=True):
            row.processors = other
        found = right(rows, ends, logits)
        for row, processors in zip(rows, own, strict=True):
            row.processors = processors
        return found

    for module in (schemes,):
        monkeypatch.setattr(module, "judged", wrong)


def mix_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those whose prompts go in together, two change places in the cache."""
    right = batches._neighbours

    def wrong(rows: Sequence[Row]) -> list[Row]:
        found = right(rows)
        if len(found) > 1:
            found[0].place, found[1].place = found[1].place, found[0].place
        return found

    monkeypatch.setattr(batches, "_neighbours", wrong)


def one_width_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows adapt to what all rows accept."""
    shared = Window(4)
    monkeypatch.setattr(requests, "Window", lambda widest: shared)


@pytest.mark.parametrize(
    ("mutant", "mode", "options"),
    [
        (keep_what_is_released, "ar", {}),
        (see_what_was_there, "diffusion", {}),
        (swap_only_keys, "ar", {}),
        (commit_for_the_next, "block", {}),
        (pad_over_the_last, "diffusion", {}),
        (draw_from_the_neighbour, "ar", {}),
        (draw_for_all_from_one, "diffusion", {"reveal": "remdm", "steps_per_block": 3, "confidence_threshold": None}),
        (judge_by_the_neighbour, "block", {}),
        (mix_the_lanes, "ar", {}),
        (one_width_for_all, "speculative", {"block_size": None}),
    ],
)
def test_a_leak_between_rows_would_be_noticed(
    mutant: Callable[[pytest.MonkeyPatch], None], mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(30):
            crowd = crowd_of([mode], "causal", Random(seed))
            asks = [replace(ask, options=ask.options | options) for ask in crowd.asks]
            check(model_for("causal", "in_place"), replace(crowd, asks=asks))


# --- Turns ----------------------------------------------------------------------------------------


def test_modes_take_turns_and_prompts_go_in_between() -> None:
    """While texts of three modes and long prompts are under way, each is looked at every few forwards."""
    model, seen = model_for("causal", "in_place"), dict[int, list[int]]()

    def watch(steps: Sequence[Step]) -> None:
        for step in steps:
            seen.setdefault(step.row, []).append(step.forward)

    session = Session(model, slots=6, prefill=2, budget=PLENTY, watchers=[watch])
    modes: list[dict[str, Any]] = [
        {"mode": "ar"}, {"mode": "block", "steps_per_block": 3}, {"mode": "speculative", "block_size": 2},
    ]  # fmt: skip
    for length in (1, 30):
        for options in modes:
            session.admit(Request(texts(length, [length])[0], max_new_tokens=60, **options))
    for _ in range(100):
        assert session.step() == []
    assert len(seen) == 6
    for row in seen.values():
        # Each mode has every third forward, and while prompts go in, every second of those is theirs.
        assert max(b - a for a, b in itertools.pairwise(row)) <= 6


# --- Who leaves -----------------------------------------------------------------------------------

VICTIM = 1  # of a company of four, on three places


def company(mode: str, **options: Any) -> list[Ask]:
    """Four texts of one mode that end at different times, the second of them with further options."""
    prompts = texts(5, [6, 9, 3, 5])
    if mode == "infill":
        prompts = [[*prompt, *[MASK] * (4 + i), 1] for i, prompt in enumerate(prompts)]
    found = []
    for i, prompt in enumerate(prompts):
        own: dict[str, Any] = {"mode": mode}
        own |= {"block_size": 2} if mode == "infill" else {"max_new_tokens": (7, 17, 12, 9)[i]}
        own |= {"do_sample": True, "temperature": 1.2} if i % 2 else {}
        found.append(Ask(ids=prompt, options=own | (options if i == VICTIM else {}), seed=i))
    return found


@functools.cache
def each_alone(mode: str) -> list[Any]:
    return [alone(model_for("causal", "in_place"), ask) for ask in company(mode)]


def in_company(mode: str, **options: Any) -> Done:
    """What becomes of the second text, if nothing becomes of the others."""
    session = Session(model_for("causal", "in_place"), slots=3, prefill=4, budget=PLENTY)
    found = together(session, company(mode, **options))
    for i, (done, right) in enumerate(zip(found, each_alone(mode), strict=True)):
        if i != VICTIM:
            assert (done.tokens, ledger(done.stats), done.error) == (*right, None)
        elif not {"reveal", "logits_processor"} & set(options):
            assert done.tokens == right[0][: len(done.tokens)]
    return found[VICTIM]


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


class Broken:
    """What a caller hands in, which fails the `fails_at`-th time that it is asked."""

    def __init__(self, fails_at: int) -> None:
        self.left, self.error, self.ended = fails_at, RuntimeError("a user's mistake"), 0

    def ask(self, result: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return result

    def options(self, what: str) -> dict[str, Any]:
        return {
            "logits_processor": {what: [lambda ids, scores: self.ask(scores)]},
            "stopping_criteria": {what: [lambda ids, scores: self.ask(False)]},
            "watchers": {what: [lambda steps: self.ask()]},
            "reveal": {what: lambda canvas, logits: self.ask(canvas.show(canvas.rank(canvas.certainty) == 0))},
            "streamer": {what: self},
        }[what]

    def put(self, tokens: Tensor) -> None:
        self.ask()

    def end(self) -> None:
        self.ended += 1
        self.ask()


@every_mode
@pytest.mark.parametrize("what", ["logits_processor", "stopping_criteria", "watchers", "reveal", "streamer"])
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_what_fails_ends_its_own_request(mode: str, what: str, fails_at: int) -> None:
    if (what == "reveal" and mode in ("ar", "speculative")) or (what == "stopping_criteria" and mode == "infill"):
        return  # there is none
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
    assert isinstance(done.error, ValueError if broken(torch.zeros(1, 1), torch.zeros(1, 1)) else TypeError)


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
        place = len(asks[VICTIM].ids) + (16 if ends else 5)
        if steps[0].place == place:
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
            read.append(ids)
            yield ids

    results, found = decode(model, source(), slots=2, max_new_tokens=3), []
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
    ],
    ids=str,
)  # fmt: skip
def test_a_session_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=[*options][-1]):
        Session(model_for("causal", "in_place"), **options)
    with pytest.raises(ValueError, match=[*options][-1]):
        decode(model_for("causal", "in_place"), [], **options)


# --- Memory ---------------------------------------------------------------------------------------


def room_taken(session: Session) -> int:
    """Tokens that the caches of a session have room for."""
    return sum(batch.places.size for batch in session._rows.batches.values())


class Rooms:
    """While this is open: what the caches of a session come to, whenever one of them changes, and who gets a place."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.places: list[int] = []
        self.session: Session | None = None

    def __enter__(self) -> "Rooms":
        resize, add = KVCache.resize, Batch.add

        def resized(cache: KVCache, rows: int, slots: int) -> None:
            resize(cache, rows, slots)
            assert self.session is not None
            self.taken.append(room_taken(self.session))

        def added(batch: Batch, row: Row) -> None:
            self.places.append(row.index)
            add(batch, row)

        self.patches = [patch.object(KVCache, "resize", resized), patch.object(Batch, "add", added)]
        for each in self.patches:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.patches:
            each.stop()


@pytest.mark.parametrize(("clean", "prediction"), KINDS[:4])
@settings(derandomize=True, max_examples=15)
@given(random=st.randoms(use_true_random=False))
def test_caches_keep_within_the_budget_and_nobody_waits_for_ever(clean: str, prediction: str, random: Random) -> None:
    """Not even if it has room for the largest text only."""
    model, crowd = model_for(clean, prediction), crowd_of(MODES[clean], clean, random)
    budget = int(most_needed(model, crowd.asks) * random.choice([1, 1.3, 2.5]))
    with Rooms() as rooms:
        rooms.session = Session(model, slots=crowd.slots, prefill=crowd.prefill, budget=budget)
        found = together(rooms.session, crowd.asks)
    assert max(rooms.taken, default=0) <= budget
    assert rooms.places == sorted(rooms.places)  # nobody is overtaken
    for ask, done in zip(crowd.asks, found, strict=True):
        if ask.cancelled is None:
            assert done.tokens == alone(model, ask)[0]


def test_long_texts_get_their_turn_behind_short_ones() -> None:
    """A long one waits until the short ones before it have ended, and those behind it wait for it."""
    model, options = model_for("causal", "in_place"), {"mode": "ar", "max_new_tokens": 6}
    asks = [Ask(ids=texts(i, [4])[0], options=options) for i in range(12)]
    asks[3] = Ask(ids=texts(3, [90])[0], options=options)
    with Rooms() as rooms:
        rooms.session = Session(model, slots=4, budget=100)
        found = together(rooms.session, asks)
    assert rooms.places == list(range(12)) and max(rooms.taken) <= 100
    assert [done.tokens for done in found] == [alone(model, ask)[0] for ask in asks]


def test_wide_rows_beside_long_ones_take_no_room_for_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window of one is 50 wide, and another's text is 45 long: a row of the cache has room for the longer."""
    model, asks = model_for("causal", "in_place"), [
        Ask(ids=[1], options={"mode": "diffusion", "max_new_tokens": 50}),
        Ask(ids=texts(0, [45])[0], options={"mode": "diffusion", "max_new_tokens": 8}),
    ]  # fmt: skip
    budget = 2 * most_needed(model, asks)
    with Rooms() as rooms:
        rooms.session = Session(model, slots=2, budget=budget)
        found = together(rooms.session, asks)
    assert max(rooms.taken) <= budget and rooms.session.stats.forwards < 60
    assert [done.tokens for done in found] == [alone(model, ask)[0] for ask in asks]


def test_a_row_that_rests_between_others_is_nowhere_beyond_its_text() -> None:
    """Two long prompts go in on both sides of a text that is under way, and that is longer than the table of positions
    has room for behind it."""
    options: dict[str, Any] = {"mode": "ar"}
    lengths = [(1, 48), (2, 60), (1, 48), (81, 1), (81, 1)]
    asks = [Ask(ids=texts(n, [n])[0], options=options | {"max_new_tokens": new}) for n, new in lengths]
    check(model_for("causal", "in_place"), Crowd(asks=asks, slots=3))


def live_tensors() -> tuple[int, int]:
    """How many there are, and the bytes that they take; not those of layouts, of which a bounded number is kept."""
    for function in vars(shapes).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    gc.collect()
    found = [x for x in gc.get_objects() if isinstance(x, Tensor)]
    return len(found), sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


def kept_for_ever() -> dict[str, int]:
    """How much the caches of functions hold that have no bound."""
    found = {}
    for module in pkgutil.walk_packages(hybrid.sampling.__path__, "hybrid.sampling."):
        for name, function in vars(importlib.import_module(module.name)).items():
            if hasattr(function, "cache_info") and function.cache_info().maxsize is None:
                found[f"{module.name}.{name}"] = function.cache_info().currsize
    return found


@pytest.mark.parametrize("count", [800, pytest.param(10_000, marks=pytest.mark.slow)])
def test_texts_that_have_ended_leave_nothing(count: int) -> None:
    model = tiny(0, num_hidden_layers=1, hidden_size=8, intermediate_size=8)
    modes: list[dict[str, Any]] = [
        {"mode": "ar"}, {"mode": "block", "temperature": 1.5}, {"mode": "ar", "repetition_penalty": 1.5, "top_k": 3},
        {"mode": "speculative"}, {"mode": "block", "reveal": "remdm", "watchers": [lambda steps: None]},
    ]  # fmt: skip
    source = (Request([i % 20] * (1 + i % 3), max_new_tokens=1 + i % 4, **modes[i % len(modes)]) for i in range(count))
    session, ended, early = Session(model, slots=8, budget=PLENTY), 0, None
    while session.free > 0 and (request := next(source, None)):
        session.admit(request)
        while session.free <= 0 or (session.active and ended + 8 >= count):
            ended += len(session.step())
            if early is None and ended >= 200:
                early = live_tensors(), kept_for_ever(), room_taken(session)
    while session.active or session.waiting:
        ended += len(session.step())
    assert ended == count and session.count == count
    assert early is not None and (session._known, session._rows.watchers) == ({}, {})
    tensors, kept, room = early
    now = live_tensors()
    assert now[0] <= tensors[0] and now[1] <= tensors[1]
    assert (kept_for_ever(), room_taken(session)) == (kept, room)


@pytest.fixture
def caches() -> Iterator[list[weakref.ref[KVCache]]]:
    """All that are made, while Python does not look for cycles."""
    found, made = [], KVCache.__init__

    def init(cache: KVCache, *args: Any, **kwargs: Any) -> None:
        made(cache, *args, **kwargs)
        found.append(weakref.ref(cache))

    gc.collect()
    gc.disable()
    with patch.object(KVCache, "__init__", init):
        yield found
    gc.enable()


@every_mode
def test_caches_go_as_soon_as_nobody_needs_them(mode: str, caches: list[weakref.ref[KVCache]]) -> None:
    model, streamer = model_for("causal", "in_place"), Broken(-1)
    (ask, *_) = company(mode)
    alone(model, ask)
    assert caches and not any(ref() for ref in caches)
    caches.clear()
    read = []

    def source() -> Iterator[Request]:
        for _ in range(9):
            read.append(1)
            yield Request(ask.ids, streamer=streamer, **ask.options)

    # A caller that stops iterating, with texts under way.
    for _ in decode(model, source(), slots=2):
        break
    assert caches and not any(ref() for ref in caches)
    assert streamer.ended == len(read) < 9
    session = Session(model, slots=2)
    session.admit(ask.request)
    session.step()
    del session
    assert not any(ref() for ref in caches)


# --- Nothing is shared ----------------------------------------------------------------------------

WAYS: list[dict[str, Any]] = [
    {"mode": "ar"}, {"mode": "block", "confidence_threshold": 0.4}, {"mode": "diffusion", "reveal": "remdm"},
    {"mode": "speculative"}, {"mode": "speculative", "fused": True}, {"mode": "infill"},
    {"mode": "ar", "do_sample": True, "temperature": 1.3}, {"mode": "speculative", "do_sample": True},
]  # fmt: skip


def calls(model: HybridForCausalLM, count: int) -> list[Callable[[], Any]]:
    """Calls of `generate` and `infill` in all modes, every third with a draft adapter."""
    adapter = adapter_of(model_for("causal", "in_place", seed=2))
    found = []
    for i in range(count):
        options = dict(WAYS[i % len(WAYS)])
        if options["mode"] != "infill":
            options["max_new_tokens"] = 4 + i % 5
        ask = Ask(ids=[*texts(i, [1 + i % 7])[0], *([MASK, 3, MASK] * (options["mode"] == "infill"))], options=options)
        found.append(functools.partial(alone, model, ask, None if i % 3 else adapter))
    return found


def test_threads_share_a_model() -> None:
    want = [call() for call in calls(model_for("causal", "in_place"), 50)]
    # One that has not been decoded with yet: what is prepared at first is prepared by several at once.
    work, found = calls(tiny(2, peaked=0.4), 50), dict[int, list[Any]]()

    def run(first: int) -> None:
        start.wait()
        found[first] = [work[(first * 7 + i) % 50]() for i in range(50)]

    start = threading.Barrier(8)
    threads = [threading.Thread(target=run, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first in range(8):
        assert found[first] == [want[(first * 7 + i) % 50] for i in range(50)]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("where", ["logits_processor", "watchers"])
def test_a_decode_inside_another(options: dict[str, Any], where: str) -> None:
    """From a processor, where a forward is under way, and from a watcher."""
    model = model_for("causal", "in_place")
    work, inside = calls(model, len(WAYS)), list[Any]()
    want = [call() for call in work]

    def function(*given: Any) -> Any:
        if len(inside) < len(work):
            inside.append(work[len(inside)]())
        return given[-1]

    ids = [4, 5, MASK, 6, MASK, MASK] if options["mode"] == "infill" else [4, 5, 6]
    ask = Ask(ids=ids, options=options | ({} if options["mode"] == "infill" else {"max_new_tokens": 9}))
    right = alone(model, ask)
    assert alone(model, replace(ask, options=ask.options | {where: [function]})) == right
    assert len(inside) > 1 and inside == want[: len(inside)]


def test_two_sessions_take_turns_on_one_model() -> None:
    """One with a draft adapter, and one without."""
    model, adapter = model_for("causal", "in_place"), adapter_of(model_for("causal", "in_place"))
    asks = [ask_of(mode, "causal", Random(i)) for i, mode in enumerate(MODES["causal"] * 2)]
    asks = [replace(ask, arrives=0, cancelled=None) for ask in asks]
    sessions = [Session(model, slots=3, draft_adapter=own) for own in (adapter, None)]
    found: list[dict[int, Done]] = [{}, {}]
    for session, ask in itertools.product(sessions, asks):
        session.admit(ask.request)
    while any(session.active or session.waiting for session in sessions):
        for session, results in zip(sessions, found, strict=True):
            results |= {done.index: done for done in session.step()}
    drafts = []
    for results, own in zip(found, (adapter, None), strict=True):
        want = [alone(model, ask, own) for ask in asks]
        assert [(results[i].tokens, ledger(results[i].stats)) for i in range(len(asks))] == want
        drafts.append(want)
    assert drafts[0] != drafts[1]


def test_a_model_is_as_it_was() -> None:
    """No hook, no flag, no module and no number of it has changed, whatever was decoded and whatever failed."""
    model = tiny(2, peaked=0.4)

    def state() -> list[Any]:
        found: list[Any] = []
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if key in ("_parameters", "_buffers"):
                    found += [(name, k, id(x), None if x is None else x.tolist()) for k, x in value.items()]
                else:
                    plain = isinstance(value, bool | int | float | str | tuple | None)
                    length = len(value) if hasattr(value, "__len__") else 0
                    found.append((name, key, value if plain else id(value), length))
        return found

    before, adapter = state(), adapter_of(model_for("causal", "in_place"))
    for call in calls(model, len(WAYS) * 3):
        call()
    list(decode(model, [[1], [2, 3]], mode="speculative", draft_adapter=adapter, max_new_tokens=5))
    with pytest.raises(RuntimeError):
        model.generate(torch.tensor([[1]]), **Broken(2).options("logits_processor"))
    assert state() == before
    assert all(x.requires_grad and not x.is_inference() for x in model.parameters())


# --- The ledger -----------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("prefill", [1, 3, 4, 9, None])
def test_prefill_is_counted_by_pieces(clean: str, prediction: str, prefill: int | None) -> None:
    model, unit = model_for(clean, prediction), 4 if clean == "block" else 1
    for mode in MODES[clean]:
        for length in (1, 3, 4, 8, 11):
            ids = texts(length, [length])[0] + ([MASK, 1] if mode == "infill" else [])
            options = {"mode": mode} | ({} if mode == "infill" else {"max_new_tokens": 3})
            session = Session(model, slots=1, prefill=prefill, **options)
            session.admit(ids)
            found: list[Done] = []
            while not found:
                found = session.step()
            clean_tokens = 0 if clean == "full" else length // unit * unit
            piece = max(1, (prefill or length) // unit) * unit if prefill else max(1, clean_tokens)
            assert found[0].stats.prefill == session.stats.prefill == -(-clean_tokens // piece)


@every_kind
@pytest.mark.parametrize("hooked", [True, False])
def test_a_session_counts_every_forward_once(clean: str, prediction: str, hooked: bool) -> None:
    """Counted by a hook on the backbone, and where a hook would turn the fast path off, by the fast path."""
    model, count = tiny(2, peaked=0.4, clean_attention=clean, diffusion_prediction=prediction), [0]

    def counted(*_: Any) -> None:
        count[0] += 1

    run = Flat.__call__
    fast = patch.object(Flat, "__call__", lambda flat, *given: (counted(), run(flat, *given))[1])
    hook = model.model.register_forward_hook(counted) if hooked else None
    for seed in range(3):
        crowd, count[0] = crowd_of(MODES[clean], clean, Random(seed)), 0
        session = Session(model, slots=crowd.slots, prefill=crowd.prefill)
        with fast:
            found = together(session, crowd.asks)
        stats = session.stats
        assert count[0] == stats.forwards == stats.prefill + stats.settle + stats.draft > 0
        for kind in ("prefill", "settle", "draft"):
            own = [getattr(done.stats, kind) for done in found]
            assert max(own) <= sum(getattr(stats, k) for k in ("prefill", "settle", "draft"))
            assert sum(own) >= getattr(stats, kind)
    if hook is not None:
        hook.remove()


def test_times_follow_one_another() -> None:
    model = model_for("causal", "in_place")
    found, stats = decode_all(model, [texts(i, [5])[0] for i in range(7)], slots=2, prefill=2, max_new_tokens=6)
    queued = [done.stats.queued for done in found]
    for done in found:
        first = done.stats.time_to_first_token
        assert first is not None and 0 <= done.stats.queued < first < done.stats.seconds < stats.seconds
    assert stats.time_to_first_token is not None
    assert stats.time_to_first_token == min(done.stats.time_to_first_token or 9 for done in found)
    session = Session(model, slots=2, budget=PLENTY)
    for _ in range(5):
        session.admit(Request([1], max_new_tokens=6))
    results = sorted((done for _ in range(40) for done in session.step()), key=lambda done: done.index)
    queued = [done.stats.queued for done in results]
    assert min(queued[2:4]) > max(queued[:2]) and queued[4] > max(queued[2:4])
    taken = Session(model, slots=1, budget=PLENTY)
    taken.admit([1])
    assert taken.cancel(0).stats.time_to_first_token is None


# --- A cache that goes on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "clean"),
    [*((mode, "causal") for mode in ("ar", "block", "diffusion", "speculative")), ("block", "block")],
)
@pytest.mark.parametrize("prediction", ["in_place", "next"])
def test_a_cache_whose_rows_changed_places_goes_on_in_every_mode(mode: str, clean: str, prediction: str) -> None:
    """Rows end in an order in which the last ones move to the front; the caller gets its own order."""
    model, prompts = model_for(clean, prediction), [[i, *texts(3, [n])[0]] for i, n in enumerate([4, 1, 7, 3])]

    def long_enough(ids: Tensor, scores: Any) -> bool:
        return ids.shape[1] >= (8, 9, 18, 29)[int(ids[0, 0])]

    options: dict[str, Any] = {"return_dict_in_generate": True}
    ids, real = padded(prompts, "left")
    with patch.object(KVCache, "swap", autospec=True, side_effect=KVCache.swap) as swapped:
        first: Any = model.generate(ids, real, mode=mode, max_new_tokens=25, stopping_criteria=[long_enough], **options)
    new = continuations(first, ids.shape[1])
    if mode != "diffusion":  # where whole texts are settled at once
        assert swapped.call_count > 0 and len({len(row) for row in new}) > 1
    whole = [prompt + more for prompt, more in zip(prompts, new, strict=True)]
    ids, real = padded(whole, "right")
    for following in ("ar", "block", "diffusion", "speculative") if clean == "causal" else ("block", "diffusion"):
        cache = copy.deepcopy(first.past_key_values)
        for row, text in enumerate(whole):
            assert cache.ids[row, : cache.lengths[row]].tolist() == text[: cache.lengths[row]]
        again: Any = model.generate(ids, real, mode=following, max_new_tokens=7, past_key_values=cache, **options)
        fresh: Any = model.generate(ids, real, mode=following, max_new_tokens=7, **options)
        assert torch.equal(again.sequences, fresh.sequences)


# --- Who is told ----------------------------------------------------------------------------------


@every_kind
def test_a_shared_watcher_is_told_once_a_forward_of_all(clean: str, prediction: str) -> None:
    model, told = model_for(clean, prediction), list[list[Step]]()
    session = Session(model, slots=3, prefill=3, watchers=[lambda steps: told.append(list(steps))])
    asks = [replace(ask_of(mode, clean, Random(i)), arrives=0, cancelled=None)
            for i, mode in enumerate(sorted(MODES[clean] * 3))]  # fmt: skip
    found = together(session, asks)
    forwards = [{step.forward for step in steps} for steps in told]
    assert all(len(numbers) == 1 for numbers in forwards)
    numbers = [min(own) for own in forwards]
    assert numbers == sorted(set(numbers)) and max(numbers) <= session.stats.forwards
    assert any(len({step.row for step in steps}) > 1 for steps in told)
    for done, ask in zip(found, asks, strict=True):
        settled = {step.place + i: token for steps in told for step in steps if step.row == done.index
                   for i, token in enumerate(step.settled)}  # fmt: skip
        new = done.tokens if ask.options["mode"] != "infill" else done.tokens[ask.ids.index(MASK) :]
        assert [settled[place] for place in sorted(settled)] == new


class Heard:
    """A streamer that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = 0

    def put(self, tokens: Tensor) -> None:
        assert not self.ended
        self.heard.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@every_kind
def test_streamers_hear_their_own_text_and_its_end(clean: str, prediction: str) -> None:
    model = model_for(clean, prediction)
    asks = [replace(ask_of(mode, clean, Random(i)), arrives=i) for i, mode in enumerate(MODES[clean] * 3)]
    heard = [Heard() for _ in asks]
    asks = [replace(ask, options=ask.options | {"streamer": own}) for ask, own in zip(asks, heard, strict=True)]
    found = together(Session(model, slots=3, prefill=3), asks)
    for ask, done, own in zip(asks, found, heard, strict=True):
        prompt = ask.ids[: ask.ids.index(MASK)] if ask.options["mode"] == "infill" else ask.ids
        text = done.tokens if ask.options["mode"] == "infill" else prompt + done.tokens
        assert own.ended == 1 and own.heard[0] == prompt
        assert [token for part in own.heard for token in part] == text
