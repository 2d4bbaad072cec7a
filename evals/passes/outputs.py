"""Prompts, settings, and what a setting makes of the prompts: the outputs that everything else is measured on."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid import HybridForCausalLM
from hybrid import texts as texts_of
from hybrid.noise import source_of
from hybrid.sampling import GenerationStats, Request, decode_all
from hybrid.sampling.record import Step, Watcher


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A held-out prompt.

    Attributes:
        ids: its tokens.
        text: the same as text.
        target: the true continuation; empty where there is none.
    """

    ids: list[int]
    text: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to decode: a mode and its options of `generate`. `name` is unique within a sweep."""

    name: str
    mode: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def lossless(self) -> bool:
        """Whether greedy output is left-to-right output by construction."""
        return self.mode in ("ar", "speculative")


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a setting made of the prompts: new tokens and text of each, and the ledger of them all."""

    tokens: list[list[int]]
    texts: list[str]
    stats: GenerationStats


def decode(
    model: HybridForCausalLM, tokenizer: Any, prompts: Sequence[Prompt], setting: Setting, *,
    max_new_tokens: int, batch_size: int, seed: int = 0, numbers: Sequence[int] | None = None,
    watcher: Watcher | None = None, progress: Callable[[int], object] = lambda done: None, **options: Any,
) -> Outputs:  # fmt: skip
    """Continue every prompt.

    Args:
        batch_size: prompts at once; the next one begins as soon as one has ended.
        numbers: of the prompts, by which they draw; by default their places.
        watcher: is told every step.
        progress: is told how many are done.
        options: of `generate`; those of the setting win.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    given = {**options, **setting.options}
    if "stop_strings" in given:
        given["tokenizer"] = tokenizer
    if watcher is not None:
        given["watchers"] = [watcher]
    pairs = zip(prompts, numbers, strict=True)
    # No batch, shard or order of the settings changes a prompt's draws.
    requests = (Request(prompt.ids, generator=source_of(seed, number)) for prompt, number in pairs)
    count = itertools.count(1)
    found, stats = decode_all(
        model, requests, slots=batch_size, mode=setting.mode, max_new_tokens=max_new_tokens,
        on_done=lambda done: progress(next(count)), **given,
    )  # fmt: skip
    tokens = [done.tokens for done in found]
    texts = [texts_of.decode(tokenizer, t, after=p.ids) for t, p in zip(tokens, prompts, strict=True)]
    return Outputs(tokens=tokens, texts=texts, stats=stats)


class Reveals:
    """Counts, of the tokens that a call ended up with, how many each forward revealed to each row: a watcher.

    A confirmed draft was revealed by the forward that drafted it, as in `hybrid.sampling.display.slots`. Prefill and
    what it gives are left out, so that the mean is tokens per forward exactly.
    """

    def __init__(self) -> None:
        self._revealed: dict[tuple[int, int], int] = {}  # (row, forward) -> tokens
        self._drafts: dict[int, dict[int, tuple[int, int]]] = {}  # row -> position -> (token, forward)
        self._prefill: set[tuple[int, int]] = set()

    def __call__(self, steps: Sequence[Step]) -> None:
        for step in steps:
            here = (step.row, step.forward)
            self._revealed.setdefault(here, 0)
            if step.kind == "prefill":
                self._prefill.add(here)
            drafts = self._drafts.setdefault(step.row, {})
            for position, token in enumerate(step.settled, step.position):
                known = drafts.get(position)
                by = known[1] if known is not None and known[0] == token else step.forward
                self._revealed[step.row, by] = self._revealed.get((step.row, by), 0) + 1
            if step.settled:
                drafts.clear()  # what is drafted behind settled text belongs to a new window
            for position, draft in enumerate(step.window, step.position + len(step.settled)):
                if draft is None:
                    drafts.pop(position, None)
                elif drafts.get(position, (None,))[0] != draft:
                    drafts[position] = (draft, step.forward)

    @property
    def histogram(self) -> Counter[int]:
        """Tokens that a forward revealed to a row -> how many forwards did."""
        return Counter(n for at, n in self._revealed.items() if at not in self._prefill)
