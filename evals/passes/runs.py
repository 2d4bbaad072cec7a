"""Passes over the prompts, each made now or taken from a journal, alone or with other processes."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field

from hybrid import HybridForCausalLM, __version__
from hybrid.evals.document import Number, Part
from hybrid.evals.passes.journal import Journal, fingerprint, key_of
from hybrid.evals.passes.outputs import Prompt, Reveals, Setting, decode
from hybrid.evals.passes.shards import Shards
from hybrid.evals.timing.machine import PeakMemory, environment

KINDS = ("prefill", "settle", "draft")
TIMED = 8  # prompts whose single calls are timed


class Pass(Part):
    """All prompts once. What a turn that is timed wrote is not kept, but for its digest.

    Attributes:
        digest: a hash of the tokens.
        memory: the peak, in bytes.
        first: seconds to the first token, of each prompt that had one.
        tokens: new ones of each prompt.
        rows: the ledger of each prompt, as fields of `RowStats`.
        forwards: batched ones of each kind.
        steps: tokens that a forward revealed to a row -> how many did, where it was watched.
    """

    digest: str
    seconds: Number
    memory: int | None
    first: list[Number]
    tokens: list[list[int]] = Field(default_factory=list)
    rows: list[dict[str, Any]] = Field(default_factory=list)
    forwards: dict[str, int] = Field(default_factory=dict)
    steps: dict[str, int] = Field(default_factory=dict)


class Calls(Part):
    """The first prompts in single calls: new tokens of each prompt; seconds, and those to the first token, of each
    call."""

    tokens: list[list[int]]
    seconds: list[Number]
    first: list[Number | None]

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.tokens)) / sum(self.seconds)


P = TypeVar("P", bound=Part)


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
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.mine = self.shards.mine(len(self.prompts), self.batch_size)
        # All processes must agree on what is left to do.
        self.known = self.shards.share(self.journal.done if self.journal else {})
        self.about = {
            "hybrid": __version__, "environment": environment(self.model) | {"processes": self.shards.count},
            "model": fingerprint(self.model) if self.journal else None, "prompts": digest_of(self.prompts),
            "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "seed": self.seed,
        }  # fmt: skip

    def _kept(self, make: Callable[[], P], kind: type[P], **what: Any) -> P:
        key = key_of(**self.about, **what)
        if (known := self.known.get(key)) is not None:
            return kind.model_validate(known)
        record = make()
        if self.journal is not None and self.shards.rank == 0:
            self.journal.add(key, record.plain())
        return record

    def one_pass(
        self, setting: Setting, turn: int, options: dict[str, Any], *, watched: bool, told: Callable[[int], object]
    ) -> Pass:
        """All prompts once; `told` how many are done. The timed turns keep a hash of their tokens, to be held against
        the first turn's."""

        def make() -> Pass:
            reveals, memory = Reveals(), PeakMemory(self.model.device)
            found = decode(
                self.model, self.tokenizer, [self.prompts[i] for i in self.mine], setting,
                max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, seed=self.seed, numbers=self.mine,
                watcher=reveals if watched else None, progress=told, **options,
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

        about = [setting.mode, setting.options]
        return self._kept(make, Pass, setting=about, options=options, turn=turn, watched=watched)

    def timed_calls(self, setting: Setting, turn: int, size: int) -> Calls:
        """The first prompts in calls of `size`, one call after the other, timed, in the first process: TIMED prompts,
        or one call where `size` is more."""

        def make() -> Calls:
            if self.shards.rank:
                return Calls(**self.shards.share(None))
            own: dict[str, list[Any]] = {"tokens": [], "seconds": [], "first": []}
            for start in range(0, max(size, min(TIMED, len(self.prompts)) // size * size), size):
                numbers = range(start, start + size)
                found = decode(
                    self.model, self.tokenizer, [self.prompts[i] for i in numbers], setting, batch_size=size,
                    max_new_tokens=self.max_new_tokens, seed=self.seed, numbers=numbers, **self.options,
                )  # fmt: skip
                own["tokens"] += found.tokens
                own["seconds"].append(found.stats.seconds)
                own["first"].append(found.stats.time_to_first_token)
            return Calls(**self.shards.share(own))

        about = [setting.mode, setting.options]
        return self._kept(make, Calls, setting=about, options=self.options, turn=turn, calls=[size, TIMED])

    def _merged(self, parts: list[dict[str, Any]], keep_outputs: bool) -> Pass:
        count, size = len(self.prompts), self.batch_size
        tokens, rows = (self.shards.merged([part[k] for part in parts], count, size) for k in ("tokens", "rows"))
        steps = sum((Counter(part["steps"]) for part in parts), Counter[str]())
        peaks = [part["memory"] for part in parts if part["memory"] is not None]
        forwards = {kind: sum(part["forwards"][kind] for part in parts) for kind in KINDS}
        outputs: dict[str, Any] = {"tokens": tokens, "rows": rows, "forwards": forwards, "steps": dict(steps)}
        return Pass(
            digest=hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
            seconds=max(part["seconds"] for part in parts), memory=max(peaks, default=None),
            first=[first for part in parts for first in part["first"]], **(outputs if keep_outputs else {}),
        )  # fmt: skip


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Of the prompts' tokens and targets: results of other prompts do not compare."""
    return hashlib.sha256(json.dumps([[p.ids, p.target] for p in prompts]).encode()).hexdigest()
