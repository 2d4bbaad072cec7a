"""Passes over the prompts, each made now or taken from a journal, alone or with other processes."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid import HybridForCausalLM, __version__
from hybrid.evals.columns import Record
from hybrid.evals.passes.journal import Journal, fingerprint, key_of
from hybrid.evals.passes.outputs import Prompt, Reveals, Setting, decode
from hybrid.evals.passes.shards import Shards
from hybrid.evals.timing.machine import PeakMemory, environment

KINDS = ("prefill", "settle", "draft")
TIMED = 8  # prompts whose single calls are timed


@dataclass(kw_only=True)
class Runs:
    """Passes over the prompts, each from the journal or made now."""

    model: HybridForCausalLM
    tokenizer: Any
    prompts: Sequence[Prompt]
    max_new_tokens: int
    batch_size: int
    seed: int
    journal: Journal | None
    shards: Shards
    options: Record

    def __post_init__(self) -> None:
        self.mine = self.shards.mine(len(self.prompts), self.batch_size)
        # All processes must agree on what is left to do.
        self.known = self.shards.share(self.journal.done if self.journal else {})
        self.about = {
            "hybrid": __version__, "environment": environment(self.model) | {"processes": self.shards.count},
            "model": fingerprint(self.model) if self.journal else None, "prompts": digest_of(self.prompts),
            "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "seed": self.seed,
        }  # fmt: skip

    def _kept(self, make: Callable[[], Record], **what: Any) -> Record:
        key = key_of(**self.about, **what)
        if (known := self.known.get(key)) is not None:
            return dict(known)
        record = make()
        if self.journal is not None and self.shards.rank == 0:
            self.journal.add(key, record)
        return record

    def one_pass(
        self, setting: Setting, turn: int, options: Record, *, watched: bool, told: Callable[[], None]
    ) -> Record:
        """All prompts once. The timed turns keep a hash of their tokens, to be held against the first turn's."""

        def make() -> Record:
            reveals, memory = Reveals(), PeakMemory(self.model.device)
            found = decode(
                self.model, self.tokenizer, [self.prompts[i] for i in self.mine], setting,
                max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, seed=self.seed, numbers=self.mine,
                watcher=reveals if watched else None, progress=lambda done: told(), **options,
            )  # fmt: skip
            stats, kept = found.stats, ("tokens", "free", "settle", "draft", "accepted")
            waits = ((row.time_to_first_token, row.queued) for row in stats.rows)
            own = {
                "tokens": found.tokens, "rows": [{name: getattr(row, name) for name in kept} for row in stats.rows],
                "forwards": {kind: getattr(stats, kind) for kind in KINDS}, "seconds": stats.seconds,
                "first": [first - queued for first, queued in waits if first is not None],
                "memory": memory.bytes, "steps": {str(n): count for n, count in reveals.histogram.items()},
            }  # fmt: skip
            return self._merged(self.shards.gather(own), keep_outputs=turn == 0)

        return self._kept(make, setting=[setting.mode, setting.options], options=options, turn=turn, watched=watched)

    def timed_calls(self, setting: Setting, turn: int, size: int) -> Record:
        """The first prompts in calls of `size`, one call after the other, timed, in the first process: TIMED prompts,
        or one call where `size` is more."""

        def make() -> Record:
            if self.shards.rank:
                return dict(self.shards.share(None))
            own: Record = {"tokens": [], "seconds": [], "first": []}
            for start in range(0, max(size, min(TIMED, len(self.prompts)) // size * size), size):
                numbers = range(start, start + size)
                found = decode(
                    self.model, self.tokenizer, [self.prompts[i] for i in numbers], setting, batch_size=size,
                    max_new_tokens=self.max_new_tokens, seed=self.seed, numbers=numbers, **self.options,
                )  # fmt: skip
                own["tokens"] += found.tokens
                own["seconds"].append(found.stats.seconds)
                own["first"].append(found.stats.time_to_first_token)
            return dict(self.shards.share(own))

        return self._kept(
            make, setting=[setting.mode, setting.options], options=self.options, turn=turn, calls=[size, TIMED]
        )

    def _merged(self, parts: list[Record], keep_outputs: bool) -> Record:
        count, size = len(self.prompts), self.batch_size
        tokens, rows = (self.shards.merged([part[k] for part in parts], count, size) for k in ("tokens", "rows"))
        steps = sum((Counter(part["steps"]) for part in parts), Counter[str]())
        peaks = [part["memory"] for part in parts if part["memory"] is not None]
        record = {
            "digest": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
            "seconds": max(part["seconds"] for part in parts), "memory": max(peaks, default=None),
            "first": [first for part in parts for first in part["first"]],
        }  # fmt: skip
        if keep_outputs:
            forwards = {kind: sum(part["forwards"][kind] for part in parts) for kind in KINDS}
            record |= {"tokens": tokens, "rows": rows, "forwards": forwards, "steps": dict(steps)}
        return record


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Of the prompts' tokens and targets: results of other prompts do not compare."""
    return hashlib.sha256(json.dumps([[p.ids, p.target] for p in prompts]).encode()).hexdigest()
