"""A session: texts that are decoded together, join while others are under way, and leave when they end."""

import queue
from collections.abc import Sequence
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.common.checks import is_whole, require
from hybrid.sampling.options.auto import chosen
from hybrid.sampling.options.checks import Options
from hybrid.sampling.options.merge import merge
from hybrid.sampling.places import found_tokens, needed
from hybrid.sampling.record import Chance
from hybrid.sampling.request import Done, Request, options_of, row_of
from hybrid.sampling.row import Plan, Row
from hybrid.sampling.rows import Rows

PREFILL = 256  # tokens of a prompt in one forward, so that rows that are being decoded do not wait for long


class Session:
    """Requests that are decoded together: they join at any step, and what one of them gets does not depend on the
    others.

    Attributes:
        stats: the ledger of all forwards so far, without rows; each result has its own (`Done.stats`).
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
            found, choice = chosen(model, Options(ours=options, theirs={}, explicit=frozenset(options)), slots)
            options = {name: value for name, value in found.ours.items() if name != "auto_allow"}
        if "mode" in options:
            options_of(model, {}, options)
        else:  # what else is wrong with them depends on each request's
            merge(model, options)
        self.model, self.options, self.queue_size = model, options, queue_size
        self.budget = found_tokens(model) if budget is None else budget
        self._rows = Rows(model, slots, adapter=draft_adapter, budget=self.budget, prefill=prefill)
        self.stats = self._rows.stats
        self.stats.mode, self.stats.cache = options.get("mode", ""), options.get("cache")
        self.stats.choice = choice
        self.count = 0
        self._ended = 0  # tokens of texts that have
        self._known: dict[int, Row] = {}

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
        row = self._checked(request)
        self.stats.mode = self.stats.mode or row.plan.mode
        self._rows.add(row)
        self._known[row.index] = row
        self.count += 1
        return row.index

    def check(self, request: Request) -> Plan:
        """Whether `admit` would take a request, which stays outside; returns how it would be decoded. For any thread.

        Raises:
            ValueError: something about it is out of range, or it is too long for the budget.
        """
        return self._checked(request).plan

    def _checked(self, request: Request) -> Row:
        row = row_of(self.model, request, self.count, self.options)
        require(
            not (row.plan.law.cached or row.plan.cache) or needed(row) <= self.budget,
            f"ids: {row.length} tokens and up to {row.limit - row.length} new ones take {needed(row)} slots of a "
            f"cache, and the budget is {self.budget}: shorten the prompt or max_new_tokens, or give more.",
        )
        return row

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
            known = [(at, chance) for at, chance in sorted(record.chances.items()) if at < row.length]
            chances["chances"] = [chance for at, chance in known if at >= row.prompt]
            if record.wants_prompt:
                chances["prompt_chances"] = [chance for at, chance in known if at < row.prompt]
        return Done(
            index=row.index, tokens=row.text[: row.length] if row.infill else row.new, stats=row.stats, error=row.error,
            log_probs=record.log_probs(row.length - row.prompt) if record is not None and record.want_scores else None,
            **chances,
        )  # fmt: skip
