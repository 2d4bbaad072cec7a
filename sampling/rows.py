"""Rows that are decoded together: who waits, who has a place, whose turn it is, and who is told.

Rows of one mode share every forward; the modes take turns.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hybrid import HybridForCausalLM, KVCache
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.common.checks import require
from hybrid.fast.flat import Flat
from hybrid.sampling.batch import Batch
from hybrid.sampling.choosing.choice import outside
from hybrid.sampling.engine import Engine
from hybrid.sampling.places import Places, needed
from hybrid.sampling.record import Step, Streaming, Watcher
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.schemes.speculation import Ahead, Speculative
from hybrid.sampling.stats import GenerationStats
from hybrid.sampling.window import Window


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
        self, model: HybridForCausalLM, slots: int, *, adapter: DraftAdapter | str | None = None,
        budget: int | None = None, prefill: int | None = None, cache: KVCache | None = None,
    ) -> None:  # fmt: skip
        """`slots`: rows at once. `adapter`: active while drafting, or its folder. `budget`: tokens that the caches have
        room for together; None: no bound. `prefill`: tokens of a prompt in one forward; None: all. `cache`: the
        caller's, whose rows go on where they end, in the order in which they are added, and keep what they had when
        they leave."""
        self.model, self.slots, self.budget, self.prefill, self.cache = model, slots, budget, prefill, cache
        self.stats = GenerationStats("", [])
        self.engine = Engine(model=model, flat=None, adapter=adapter_of(adapter, model), stats=self.stats)
        self.waiting: deque[Row] = deque()
        self.batches: dict[object, Batch] = {}
        self._reach = self._turn = 0
        self._inside = False  # a forward, and what follows from it

    @property
    def active(self) -> list[Row]:
        """Those that have a place."""
        return [row for batch in self.batches.values() for row in batch.places.rows.values()]

    def add(self, row: Row) -> None:
        """Let a row wait for a place, and tell its streamer what its text begins with.

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
        self.waiting.append(row)
        _stream(row, lambda streamer: streamer.begin(row.text[: row.length]))

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
                told = batch.step()
            finally:
                self._inside = False
            self._tell(told)
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
        self._end_stream(row)
        row.stats.tokens = row.gaps - row.text.count(row.fill) if row.infill else row.length - row.prompt
        row.stats.seconds = time.perf_counter() - row.admitted

    def end_streams(self) -> None:
        """Tell the streamers of all who are left that it is over, so that nobody waits for more."""
        for row in (*self.waiting, *self.active):
            self._end_stream(row)

    @staticmethod
    def _end_stream(row: Row) -> None:
        _stream(row, Streaming.end)
        row.watchers = ()

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
            self.batches[key] = Batch(self.engine, plan.scheme(plan.law, self.prefill), places)
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

    def _tell(self, told: Sequence[tuple[Row, Step]]) -> None:
        """Tell each watcher at once what happened to all the rows that it watches; what one raises ends those rows."""
        by: dict[int, tuple[Watcher, list[tuple[Row, Step]]]] = {}
        for row, step in told:
            for watcher in row.watchers:
                by.setdefault(id(watcher), (watcher, []))[1].append((row, step))
        # Streamers first: another watcher may take a row out, and nothing is put into a stream that has ended.
        for watcher, steps in sorted(by.values(), key=lambda one: not isinstance(one[0], Streaming)):
            try:
                with outside():
                    watcher([step for _, step in steps])
            except Exception as error:
                for row, _ in steps:
                    row.error = row.error or error


def _stream(row: Row, tell: Callable[[Streaming], object]) -> None:
    """Tell a row's streamer something; what it raises is the row's error."""
    for watcher in row.watchers:
        if isinstance(watcher, Streaming):
            try:
                tell(watcher)
            except Exception as error:
                row.error = row.error or error
