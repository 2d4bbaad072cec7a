"""Prompts, settings, and what a setting makes of the prompts: the outputs that everything else is measured on."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.sampling import GenerateOutput, GenerationStats
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
    """What a setting made of the prompts: new tokens and text of each, and the ledger of each batch."""

    tokens: list[list[int]]
    texts: list[str]
    stats: list[GenerationStats]


def generator_of(seed: int, number: int) -> torch.Generator:
    """The source of all randomness for prompt `number`: no batch, shard or order of the settings changes its draws."""
    key = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def decode(
    model: HybridForCausalLM, tokenizer: Any, prompts: Sequence[Prompt], setting: Setting, *,
    max_new_tokens: int, batch_size: int, seed: int = 0, numbers: Sequence[int] | None = None,
    watch: Callable[[], Watcher] | None = None, after_batch: Callable[[], None] = lambda: None, **options: Any,
) -> Outputs:  # fmt: skip
    """Continue every prompt.

    Args:
        numbers: of the prompts, by which they draw; by default their places.
        watch: makes the watcher of each batch.
        options: of `generate`; those of the setting win.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    given = {**options, **setting.options}
    if "stop_strings" in given:
        given["tokenizer"] = tokenizer
    tokens: list[list[int]] = []
    stats: list[GenerationStats] = []
    for at in range(0, len(prompts), batch_size):
        batch = prompts[at : at + batch_size]
        longest = max(len(prompt.ids) for prompt in batch)
        # What stands under a mask of 0 is not read; 0 serves where a tokenizer has no padding.
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (longest - len(p.ids)) + p.ids for p in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in batch], device=model.device)
        draws = [generator_of(seed, number) for number in numbers[at : at + batch_size]]
        out = model.generate(
            ids, attention_mask=mask, mode=setting.mode, max_new_tokens=max_new_tokens, return_dict_in_generate=True,
            generator=draws, **({"watchers": [watch()]} if watch else {}), **given,
        )  # fmt: skip
        assert isinstance(out, GenerateOutput) and out.sequences is not None and out.stats is not None
        stats.append(out.stats)
        tokens += [
            row[longest : longest + got.tokens].tolist()
            for row, got in zip(out.sequences, out.stats.rows, strict=True)
        ]
        after_batch()
    return Outputs(tokens=tokens, texts=[text_of(tokenizer, t) for t in tokens], stats=stats)


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """New tokens as text, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class Reveals:
    """Counts, of the tokens that a call ended up with, how many each forward revealed to each row: a watcher.

    A confirmed draft was revealed by the forward that drafted it, as in `hybrid.sampling.slots`. Prefill and what it
    gives are left out, so that the mean is tokens per forward exactly.
    """

    def __init__(self) -> None:
        self._revealed: dict[tuple[int, int], int] = {}  # (row, forward) -> tokens
        self._drafts: dict[int, dict[int, tuple[int, int]]] = {}  # row -> place -> (token, forward)
        self._prefill: set[tuple[int, int]] = set()

    def __call__(self, steps: Sequence[Step]) -> None:
        for step in steps:
            here = (step.row, step.forward)
            self._revealed.setdefault(here, 0)
            if step.kind == "prefill":
                self._prefill.add(here)
            drafts = self._drafts.setdefault(step.row, {})
            for place, token in enumerate(step.settled, step.place):
                known = drafts.get(place)
                by = known[1] if known is not None and known[0] == token else step.forward
                self._revealed[step.row, by] = self._revealed.get((step.row, by), 0) + 1
            if step.settled:
                drafts.clear()  # what is drafted behind settled text belongs to a new window
            for place, draft in enumerate(step.window, step.place + len(step.settled)):
                if draft is None:
                    drafts.pop(place, None)
                elif drafts.get(place, (None,))[0] != draft:
                    drafts[place] = (draft, step.forward)

    @property
    def histogram(self) -> Counter[int]:
        """Tokens that a forward revealed to a row -> how many forwards did."""
        return Counter(n for at, n in self._revealed.items() if at not in self._prefill)
