"""What a text gets does not depend on the others, whoever comes, waits or leaves."""

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from arrivals import (
    KINDS,
    MODES,
    PLENTY,
    VICTIM,
    Ask,
    alone,
    ask_of,
    check,
    company,
    crowd_of,
    ledger,
    model_for,
    together,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import COMBINATIONS, MASK, continuations, padded, texts, tiny
from torch import Tensor

import hybrid.sampling.batch as batches
import hybrid.sampling.choosing.choice as choice
import hybrid.sampling.choosing.draft as draft
import hybrid.sampling.rows as holding
import hybrid.sampling.schemes as schemes
from hybrid import KVCache, Layout
from hybrid.fast.flat import Flat
from hybrid.sampling import Done, Request, Session, Step, decode_all
from hybrid.sampling.batch import Engine
from hybrid.sampling.row import Row
from hybrid.sampling.window import Window

every_kind = pytest.mark.parametrize(("clean", "prediction"), KINDS)
every_mode = pytest.mark.parametrize("mode", MODES["causal"])


# --- Alone and in company -------------------------------------------------------------------------


@pytest.mark.one_in(3)
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

    def wrong(rows: Sequence[Row], ends: Sequence[Sequence[int]], logits: Tensor, *final: Any) -> Tensor:
        own = [row.processors for row in rows]
        for row, other in zip(rows, [*own[1:], own[0]], strict=True):
            row.processors = other
        found = right(rows, ends, logits, *final)
        for row, processors in zip(rows, own, strict=True):
            row.processors = processors
        return found

    monkeypatch.setattr(schemes, "judged", wrong)


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
    monkeypatch.setattr(holding, "Window", lambda *given: shared)


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


@every_kind
def test_a_forward_that_failed_can_be_tried_again(clean: str, prediction: str) -> None:
    """Out of memory, say: nothing was kept, and nothing was drawn."""
    model, hidden = model_for(clean, prediction), Engine.hidden
    asks = [replace(ask_of(mode, clean, Random(i)), cancelled=None) for i, mode in enumerate(MODES[clean] * 2)]
    session, found, fails = Session(model, slots=3, prefill=3, budget=PLENTY), dict[int, Done](), itertools.count()

    def failing(*given: Any) -> Tensor:
        out = hidden(*given)
        if next(fails) % 2:
            raise MemoryError
        return out

    for ask in asks:
        session.admit(ask.request)
    with patch.object(Engine, "hidden", failing):
        while session.active or session.waiting:
            with contextlib.suppress(MemoryError):
                found |= {done.index: done for done in session.step()}
    for i, ask in enumerate(asks):
        assert (found[i].tokens, ledger(found[i].stats)) == alone(model, ask)


def test_a_sessions_options_are_those_of_requests_that_do_not_say_otherwise() -> None:
    model = model_for("full", "in_place")
    session = Session(model, mode="block", cache="dual", max_new_tokens=6, steps_per_block=2, stop_strings=None)
    plain, own, gap = [1, 2], Request([1, 2], max_new_tokens=3, cache=None), Request([1, MASK], mode="infill")
    for request in (plain, own, gap):
        session.admit(request)
    found = {done.index: done for _ in range(30) for done in session.step()}
    options = {"mode": "block", "steps_per_block": 2}
    for i, more in enumerate([{"cache": "dual", "max_new_tokens": 6}, {"max_new_tokens": 3}]):
        assert found[i].tokens == alone(model, Ask(ids=[1, 2], options=options | more))[0]
    assert found[2].tokens == alone(model, Ask(ids=[1, MASK], options=options | {"mode": "infill"}))[0]
    session = Session(model, mode="block", temperature=0.7, steps_per_block=2, max_new_tokens=6)
    other: dict[str, Any] = {"reveal": "factor", "do_sample": False}
    session.admit(Request([1, 2], **other))
    options = {"mode": "block", "max_new_tokens": 6} | other
    (done,) = [done for _ in range(10) for done in session.step()]
    assert (done.tokens, ledger(done.stats)) == alone(model, Ask(ids=[1, 2], options=options))


def test_a_scheme_of_ones_own_spends_the_forwards_of_its_mode() -> None:
    asked: list[int] = []

    class Own(schemes.Windows):
        def next(self, row: Row) -> schemes.Part:
            asked.append(row.index)
            return super().next(row)

    model = model_for("causal", "in_place")
    session = Session(model, mode="block", scheme=Own, max_new_tokens=6)
    requests = [[1, 2], Request([1, 2], mode="block"), Request([1, 2], mode="diffusion"), Request([1, 2], scheme=None)]
    for request in requests:
        session.admit(request)
    found = {done.index: done for _ in range(40) for done in session.step()}
    assert set(asked) == {0, 1} and found[0].stats == found[1].stats == found[3].stats
    for i, mode in enumerate(["block", "block", "diffusion", "block"]):
        ask = Ask(ids=[1, 2], options={"mode": mode, "max_new_tokens": 6})
        assert found[i].tokens == alone(model, ask)[0]
    asked.clear()
    model.generate(torch.tensor([[1], [2]]), mode="diffusion", scheme=Own, max_new_tokens=6)
    assert set(asked) == {0, 1}
    with pytest.raises(ValueError, match=r"scheme.*Speculative"):
        model.generate(torch.tensor([[1]]), mode="speculative", scheme=Own)


@every_mode
def test_log_probs_come_back_with_the_tokens(mode: str) -> None:
    model, asks = model_for("causal", "in_place"), company(mode, output_scores=True)
    found = together(Session(model, slots=3, prefill=4, budget=PLENTY), asks)
    source, ids = torch.Generator().manual_seed(asks[VICTIM].seed), torch.tensor([asks[VICTIM].ids])
    options = {**asks[VICTIM].options, "generator": source, "return_dict_in_generate": True}
    if mode == "infill":
        del options["mode"]
    output: Any = (model.infill if mode == "infill" else model.generate)(ids, **options)
    assert found[VICTIM].log_probs == output.log_probs[0].tolist()
    assert [done.log_probs is None for done in found] == [True, False, True, True]


# --- The ledger -----------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("prefill", [1, 3, 4, 9, None])
def test_prefill_is_counted_by_pieces(clean: str, prediction: str, prefill: int | None) -> None:
    model = model_for(clean, prediction)
    for mode in MODES[clean]:
        unit = 4 if clean == "block" and mode not in ("ar", "speculative") else 1
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
    for done in found:
        first = done.stats.time_to_first_token
        assert first is not None and 0 <= done.stats.queued < first < done.stats.seconds < stats.seconds
    assert stats.time_to_first_token is not None
    assert stats.time_to_first_token == min(done.stats.time_to_first_token or 9 for done in found)
    session = Session(model, slots=2, budget=PLENTY)
    for _ in range(5):  # each of which takes longer than it takes to admit them all
        session.admit(Request([1], max_new_tokens=6, watchers=[lambda steps: time.sleep(0.02)]))
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
        settled = {step.position + i: token for steps in told for step in steps if step.row == done.index
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


def test_short_prompts_go_in_apart_from_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is padded to the width of a piece that is much longer, and neither kind waits for the end of the other."""
    seen, plain = list[list[int]](), batches.Batch._forward

    def forward(self: batches.Batch, rows: Any, parts: Any) -> Any:
        if parts[0].job == "prefill":
            seen.append(sorted(len(part.tokens) for part in parts))
        return plain(self, rows, parts)

    monkeypatch.setattr(batches.Batch, "_forward", forward)
    prompts = texts(5, [200, 5, 7, 180])
    session = Session(tiny(), slots=4, prefill=50, budget=100_000)
    for prompt in prompts:
        session.admit(Request(prompt, max_new_tokens=2, eos_token_id=[]))
    found = {}
    while session.active or session.waiting:
        found |= {done.index: done for done in session.step()}
    assert [5, 7] in seen[:2] and [50, 50] in seen[:2]
    assert all(widths[-1] <= max(32, 2 * widths[0]) for widths in seen)
    for index, prompt in enumerate(prompts):
        right = tiny().generate(torch.tensor([prompt]), max_new_tokens=2, eos_token_id=[])
        assert found[index].tokens == right[0, len(prompt) :].tolist()
