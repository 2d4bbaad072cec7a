"""Sessions keep within their budget, leave nothing behind, and share nothing with one another."""

import functools
import gc
import importlib
import itertools
import pkgutil
import threading
import weakref
from collections.abc import Callable, Iterator
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
    Ask,
    Broken,
    Crowd,
    adapter_of,
    alone,
    ask_of,
    check,
    company,
    crowd_of,
    ledger,
    model_for,
    most_needed,
    together,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MASK, texts, tiny
from torch import Tensor
from torch._subclasses import FakeTensor

import hybrid.sampling
from hybrid import HybridForCausalLM, KVCache
from hybrid.sampling import Done, Request, Session, decode
from hybrid.sampling.batch import Batch
from hybrid.sampling.row import Row
from hybrid.sampling.schemes import shapes

every_mode = pytest.mark.parametrize("mode", MODES["causal"])


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


def test_wide_rows_beside_long_ones_take_no_room_for_padding() -> None:
    """The window of one is 50 wide, and another's text is 45 long: a row of the cache has room for the longer."""
    model, asks = model_for("causal", "in_place"), [
        Ask(ids=[1], options={"mode": "diffusion", "max_new_tokens": 50}),
        Ask(ids=texts(0, [45])[0], options={"mode": "diffusion", "max_new_tokens": 8}),
    ]  # fmt: skip
    budget = 2 * most_needed(model, asks)
    with Rooms() as rooms:
        rooms.session = Session(model, slots=2, budget=budget)
        found = together(rooms.session, asks)
    assert max(rooms.taken) <= budget
    assert rooms.session.stats.draft < sum(done.stats.draft for done in found)  # they were drafted together
    assert [done.tokens for done in found] == [alone(model, ask)[0] for ask in asks]


def test_a_row_that_rests_between_others_is_nowhere_beyond_its_text() -> None:
    """Two long prompts go in on both sides of a text that is under way, and that is longer than the table of positions
    has room for behind it."""
    options: dict[str, Any] = {"mode": "ar"}
    lengths = [(1, 48), (2, 60), (1, 48), (81, 1), (81, 1)]
    asks = [Ask(ids=texts(n, [n])[0], options=options | {"max_new_tokens": new}) for n, new in lengths]
    check(model_for("causal", "in_place"), Crowd(asks=asks, slots=3))


def live() -> tuple[int, int, int]:
    """Tensors, the bytes that they take, and objects of any kind."""
    for function in vars(shapes).values():  # of which a bounded number is kept
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    gc.collect()
    objects = gc.get_objects()
    # A fake one, which a compiler has left behind, lies nowhere.
    storages = [x.untyped_storage() for x in objects if issubclass(type(x), Tensor) and type(x) is not FakeTensor]
    return len(storages), sum({x.data_ptr(): x.nbytes() for x in storages}.values()), len(objects)


def kept_for_ever() -> dict[str, int]:
    """How much the caches of functions hold that have no bound."""
    found = {}
    for module in pkgutil.walk_packages(hybrid.sampling.__path__, "hybrid.sampling."):
        for name, function in vars(importlib.import_module(module.name)).items():
            if hasattr(function, "cache_info") and function.cache_info().maxsize is None:
                found[f"{module.name}.{name}"] = function.cache_info().currsize
    return found


@pytest.mark.parametrize("count", [1200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_texts_that_have_ended_leave_nothing(count: int) -> None:
    model = tiny(0, num_hidden_layers=1, hidden_size=8, intermediate_size=8)
    modes: list[dict[str, Any]] = [
        {"mode": "ar"}, {"mode": "block", "temperature": 1.5}, {"mode": "ar", "repetition_penalty": 1.5, "top_k": 3},
        {"mode": "speculative"}, {"mode": "block", "reveal": "remdm", "watchers": [lambda steps: None]},
    ]  # fmt: skip
    session, numbers = Session(model, slots=8, budget=PLENTY), iter(range(count))

    def run(some: int) -> Any:
        ended = 0
        for i in itertools.islice(numbers, some):
            options = modes[i % len(modes)]
            session.admit(Request([i % 20] * (1 + i % 3), max_new_tokens=1 + i % 4, seed=i % 60, **options))
            while session.free <= 0:
                ended += len(session.step())
        while session.active or session.waiting:
            ended += len(session.step())
        assert ended == some
        return kept_for_ever(), room_taken(session), live()

    run(count // 2)  # what is made once
    *kept, (tensors, size, objects) = run(count // 4)
    *kept_now, (tensors_now, size_now, objects_now) = run(count // 4)
    # But for what a cache keeps of its last forward; and a row that stays is more than two objects, whereas others in
    # the process may make a few hundred meanwhile.
    assert kept_now == kept and tensors_now <= tensors + 5 and size_now <= size + 1000
    assert objects_now - objects < count / 8
    assert next(numbers, None) is None and session.count == count


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
    asks = company(mode)
    alone(model, asks[0])
    assert caches and not any(ref() for ref in caches)
    caches.clear()
    read = []

    def source() -> Iterator[Request]:
        for ask in asks * 3:
            read.append(ask)
            yield Request(ask.ids, streamer=streamer, **ask.options)

    # A caller that stops iterating, with texts under way.
    for _ in decode(model, source(), slots=2):
        break
    assert caches and not any(ref() for ref in caches)
    assert streamer.ended == len(read) < 12
    session = Session(model, slots=2)
    session.admit(asks[0].request)
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
    # With a processor of the caller's, drafts go from left to right, whatever it does.
    right = alone(model, replace(ask, options=ask.options | {where: [lambda *given: given[-1]]}))
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
