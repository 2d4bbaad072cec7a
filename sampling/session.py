"""A session: texts that are decoded together, join while others are under way, and leave when they end.

Texts of one mode share every forward; the modes of a session take turns.
"""

import contextlib
import itertools
import queue
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hybrid import HybridForCausalLM, KVCache
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.common.checks import is_whole, require
from hybrid.fast.flat import Flat
from hybrid.sampling.batch import Batch, Engine
from hybrid.sampling.choosing.choice import outside
from hybrid.sampling.memory import found_tokens
from hybrid.sampling.options.auto import choose
from hybrid.sampling.places import Places, needed
from hybrid.sampling.record import Chance, Step, Streaming, Watcher
from hybrid.sampling.request import Done, Request, options_of, row_of
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.schemes.speculation import Ahead, Speculative
from hybrid.sampling.stats import GenerationStats
from hybrid.sampling.window import Window

PREFILL = 256  # tokens of a prompt in one forward, so that rows that are being decoded do not wait for long


def adapter_of(given: DraftAdapter | str | Path | None, model: HybridForCausalLM) -> DraftAdapter | None:
    """A draft adapter that fits the model, from itself or its folder."""
    require(
        given is None or isinstance(given, DraftAdapter | str | Path),
        f"draft_adapter is a {type(given).__name__}; pass a DraftAdapter, or the folder of one.",
    )
    if given is not None and not isinstance(given, DraftAdapter):
        given = DraftAdapter.from_pretrained(given, model)
    if given is not None:
        given.check(model)
    return given


class Rows:
    """Rows that are decoded until they end: what `generate` and `Session` stand on.

    Attributes:
        waiting: those that have no place yet, in the order in which they came.
        stats: the ledger of all forwards.
    """

    def __init__(
        self, model: HybridForCausalLM, slots: int, *, adapter: DraftAdapter | None = None, budget: int | None = None,
        prefill: int | None = None, cache: KVCache | None = None,
    ) -> None:  # fmt: skip
        """`slots`: rows at once. `budget`: tokens that the caches have room for together; None: no bound. `prefill`:
        tokens of a prompt in one forward; None: all. `cache`: the caller's, whose rows go on where they end, in the
        order in which they are added, and keep what they had when they leave."""
        self.model, self.slots, self.budget, self.prefill, self.cache = model, slots, budget, prefill, cache
        self.stats = GenerationStats("", [])
        self.engine = Engine(model=model, flat=None, adapter=adapter, stats=self.stats)
        self.waiting: deque[Row] = deque()
        self.watchers: dict[Row, Sequence[Watcher]] = {}
        self.batches: dict[object, Batch] = {}
        self._reach = self._turn = 0
        self._inside = False  # a forward, and what follows from it
        self._told: list[tuple[Row, Step]] = []

    @property
    def active(self) -> list[Row]:
        """Those that have a place."""
        return [row for batch in self.batches.values() for row in batch.places.rows.values()]

    def add(self, row: Row, watchers: Sequence[Watcher] = ()) -> None:
        """Let a row wait for a place.

        Raises:
            ValueError: there is a draft adapter, and it has no part in how this row is decoded.
        """
        require(
            row.plan.blocks_in_flight == 1 or self.engine.adapter is None,
            "draft_adapter: blocks in flight are clean blocks that are drafted together: leave one out.",
        )
        if not (self.waiting or self.active):
            self._reach = 0  # anything may have been done to the model since
        if row.plan.scheme is Speculative and self.engine.head is not None:
            row.plan = replace(row.plan, scheme=Ahead)
        if row.plan.adaptive:
            row.window = Window(row.plan.block_size, row.plan.scheme.free, row.plan.scheme.least)
        if watchers:
            self.watchers[row] = watchers
        self.waiting.append(row)

    def step(self) -> list[Row]:
        """Give places to those who wait, and run one forward; returns the rows that ended."""
        self._check_outside()
        with torch.inference_mode():
            self._admit()
            busy = [batch for batch in self.batches.values() if batch.places.rows]
            if not busy:
                return []
            if self.engine.flat is not None and self.engine.flat.outdated:
                self.engine.flat = Flat.of(self.model, self._reach, self.engine.adapter)
            self._turn += 1
            batch = busy[self._turn % len(busy)]
            self._inside = True
            try:
                batch.step()
            finally:
                self._inside = False
            self._tell()
            # A watcher may have taken some out already.
            ended = [row for row in batch.places.rows.values() if row.finished or row.error is not None]
            for row in ended:
                self.drop(row)
        return ended

    def drop(self, row: Row) -> None:
        """Take a row out, wherever it is."""
        self._check_outside()
        if row.place < 0:
            self.waiting.remove(row)
        else:
            places = self._batch_of(row.plan).places
            places.leave(row)
            if not self.waiting:
                places.close_gaps()
        for watcher in self.watchers.pop(row, ()):
            if isinstance(watcher, Streaming):
                try:
                    watcher.streamer.end()
                except Exception as error:
                    row.error = row.error or error
        row.stats.tokens = row.gaps - row.text.count(row.fill) if row.infill else row.length - row.prompt
        row.stats.seconds = time.perf_counter() - row.admitted

    def end_streams(self) -> None:
        """Tell the streamers of all who are left that it is over, so that nobody waits for more."""
        for watcher in itertools.chain.from_iterable(self.watchers.values()):
            if isinstance(watcher, Streaming):
                with contextlib.suppress(Exception):  # what failed first is what is said
                    watcher.streamer.end()
        self.watchers.clear()

    def _admit(self) -> None:
        count = len(self.active)
        while self.waiting and count < self.slots:
            row = self.waiting[0]
            batch = self._batch_of(row.plan)
            if not batch.places.fits(row, self.slots, self._room(batch)):
                self._shrink(batch)
                if not batch.places.fits(row, self.slots, self._room(batch)):
                    break
            self._serve(needed(row))
            self.waiting.popleft()
            row.stats.queued = time.perf_counter() - row.admitted
            batch.add(row)
            count += 1

    def _room(self, batch: Batch) -> int | None:
        """What the budget leaves for a batch."""
        if self.budget is None:
            return None
        return self.budget - sum(other.places.size for other in self.batches.values() if other is not batch)

    def _shrink(self, but: Batch) -> None:
        """Give back all room of modes that have nothing to do."""
        for batch in self.batches.values():
            if batch is not but and not batch.places.rows and batch.places.size and batch.places.cache is not None:
                batch.places.cache.resize(0, 0)

    def _batch_of(self, plan: Plan) -> Batch:
        key = (plan.mode, plan.scheme)
        if key not in self.batches:
            cache, model = self.cache, self.model
            if not plan.law.cached and plan.cache is None:
                cache = None
            elif cache is None:
                cache = KVCache(model.config, 0, 0, model.device, model.dtype)
            places = Places(cache, handed_out=self.cache is not None)
            self.batches[key] = Batch(self.engine, plan.scheme(plan.law, self.prefill), places, self._told)
        return self.batches[key]

    def _serve(self, positions: int) -> None:
        """See to it that the fast path serves texts of so many positions."""
        if self._reach == 0:
            self.engine.flat = Flat.of(self.model, positions, self.engine.adapter)
        elif self.engine.flat is not None and positions > self._reach:
            positions = max(positions, 2 * self._reach)
            self.engine.flat.reach(positions)
        self._reach = max(self._reach, positions)

    def _check_outside(self) -> None:
        require(not self._inside, "a forward is under way: step and cancel when it is over (a watcher may cancel).")

    def _tell(self) -> None:
        """Tell each watcher at once what happened to all the rows that it watches; what one raises ends those rows."""
        told = self._told.copy()
        self._told.clear()
        by: dict[int, tuple[Watcher, list[tuple[Row, Step]]]] = {}
        for row, step in told:
            for watcher in self.watchers.get(row, ()):
                by.setdefault(id(watcher), (watcher, []))[1].append((row, step))
        for watcher, steps in by.values():
            try:
                with outside():
                    watcher([step for _, step in steps])
            except Exception as error:
                for row, _ in steps:
                    row.error = row.error or error


class Session:
    """Requests that are decoded together: they join at any step, and what one of them gets does not depend on the
    others.

    Attributes:
        stats: the ledger of all forwards, without rows; each result has its own.
    """

    def __init__(
        self, model: HybridForCausalLM, *, slots: int = 16, budget: int | None = None, queue_size: int | None = None,
        prefill: int | None = PREFILL, draft_adapter: DraftAdapter | str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            slots: texts at once.
            budget: tokens that the caches have room for, over all texts; by default what half of the free memory holds.
            queue_size: requests that may wait; None: any number.
            prefill: tokens of a prompt in one forward: longer prompts go in by pieces, in turn with the texts that are
                being decoded. None: all.
            draft_adapter: active while drafting, for all requests.
            options: of `generate`, for requests that do not say otherwise.

        Raises:
            ValueError: an argument is out of range, or not what the model can do.
        """
        for name, value in (("slots", slots), ("budget", budget), ("queue_size", queue_size), ("prefill", prefill)):
            least = 0 if name == "queue_size" else 1
            good = value is None or is_whole(value, least)
            require(good and (value is not None or name != "slots"), f"{name} is {value!r}; use {least} or more.")
        choice = None
        if options.get("mode") == "auto":
            found, choice = choose(model, slots, options.pop("auto_allow", ()))
            options = {**options, **found}
        if "mode" in options:
            options_of(model, {}, options)
        self.model, self.options, self.queue_size = model, options, queue_size
        self.budget = found_tokens(model) if budget is None else budget
        self._rows = Rows(model, slots, adapter=adapter_of(draft_adapter, model), budget=self.budget, prefill=prefill)
        self.stats.mode, self.stats.cache = options.get("mode", ""), options.get("cache")
        self.stats.choice = choice
        self.count = 0
        self._ended = 0  # tokens of texts that have
        self._known: dict[int, Row] = {}

    @property
    def stats(self) -> GenerationStats:
        """The ledger of all forwards so far; rows have ledgers of their own (`Done.stats`)."""
        return self._rows.stats

    @property
    def slots(self) -> int:
        """Texts at once."""
        return self._rows.slots

    @property
    def active(self) -> int:
        """Texts that are being decoded."""
        return len(self._rows.active)

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._rows.waiting)

    @property
    def free(self) -> int:
        """Requests that would get a place at the next step, as far as slots go."""
        return self.slots - self.active - self.waiting

    @property
    def tokens(self) -> int:
        """New tokens so far, of all texts."""
        return self._ended + sum(row.length - row.prompt for row in self._rows.active if not row.infill)

    @torch.no_grad()
    def admit(self, request: Request | Sequence[int] | torch.Tensor) -> int:
        """Take a request in, or bare ids, int64 `[T]` or a list; returns its number, by which its result is known.

        Raises:
            ValueError: something about it is out of range, or it is too long for the budget.
            queue.Full: as many wait as may.
        """
        if not isinstance(request, Request):
            request = Request(request)
        if self.queue_size is not None and self.free <= -self.queue_size:
            raise queue.Full(f"{self.waiting} requests wait already (queue_size): take a result first.")
        row, watchers = self._checked(request)
        self.stats.mode = self.stats.mode or row.plan.mode
        self._rows.add(row, watchers)
        self._known[row.index] = row
        self.count += 1
        return row.index

    def check(self, request: Request) -> Plan:
        """Whether `admit` would take a request, which stays outside; returns how it would be decoded. For any thread.

        Raises:
            ValueError: something about it is out of range, or it is too long for the budget.
        """
        return self._checked(request)[0].plan

    def _checked(self, request: Request) -> tuple[Row, list[Watcher]]:
        row, watchers = row_of(self.model, request, self.count, self.options)
        require(
            not (row.plan.law.cached or row.plan.cache) or needed(row) <= self.budget,
            f"ids: {row.length} tokens and up to {row.limit - row.length} new ones take {needed(row)} slots of a "
            f"cache, and the budget is {self.budget}: shorten the prompt or max_new_tokens, or give more.",
        )
        return row, watchers

    def step(self) -> list[Done]:
        """One forward; returns the requests that ended with it."""
        with torch.no_grad():
            return [self._done(row) for row in self._rows.step()]

    def cancel(self, index: int) -> Done:
        """Take a request out, waiting or under way; returns what there is of it. The others feel nothing.

        Raises:
            ValueError: there is no such request, or it has ended.
        """
        require(index in self._known, f"index is {index}; there is no such request, or it has ended.")
        row = self._known[index]
        self._rows.drop(row)
        return self._done(row)

    def close(self) -> None:
        """Take out all requests that are left; their streamers are told that it is over."""
        for index in list(self._known):
            self.cancel(index)

    def _done(self, row: Row) -> Done:
        del self._known[row.index]
        self._ended += row.stats.tokens
        record, chances = row.record, dict[str, list[Chance]]()
        if record is not None and record.likeliest is not None:
            known = {place: chance for place, chance in sorted(record.chances.items()) if place < row.length}
            chances["chances"] = [chance for place, chance in known.items() if place >= row.prompt]
            if record.wants_prompt:
                chances["prompt_chances"] = [chance for place, chance in known.items() if place < row.prompt]
        return Done(
            index=row.index, tokens=row.text[: row.length] if row.infill else row.new, stats=row.stats, error=row.error,
            log_probs=record.log_probs(row.length - row.prompt) if record is not None and record.want_scores else None,
            **chances,
        )  # fmt: skip
