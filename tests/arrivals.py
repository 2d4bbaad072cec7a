"""Texts that arrive, wait and are taken back while others are decoded, and what each of them is alone."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from oracles import MASK, texts, tiny
from torch import Tensor

from hybrid import HybridForCausalLM
from hybrid.adapters.draft_adapter import DraftAdapter
from hybrid.sampling import Done, Request, RowStats, Session
from hybrid.sampling.places import needed
from hybrid.sampling.request import row_of
from hybrid.training.text.tokenizing import character_tokenizer

MODES: dict[str, tuple[str, ...]] = {
    "causal": ("ar", "block", "diffusion", "speculative", "infill"),
    "block": ("block", "diffusion", "ar", "speculative", "infill"),
    "full": ("block", "diffusion", "infill"),
}
KINDS = [(clean, prediction) for clean in MODES for prediction in ("in_place", "next")]
PLENTY = 100_000  # slots of a cache: more than any of these texts together take
Ledger = tuple[int, int, list[int], int, int]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request. It joins before step `arrives`, and is taken back before step `cancelled` if it has not ended."""

    ids: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    arrives: int = 0
    cancelled: int | None = None

    @property
    def request(self) -> Request:
        return Request(self.ids, seed=self.seed, **self.options)


@dataclass(frozen=True, kw_only=True)
class Crowd:
    """Requests, and the session that they meet in."""

    asks: list[Ask]
    slots: int = 4
    prefill: int | None = None
    adapted: bool = False


def ledger(stats: RowStats) -> Ledger:
    """What is the same however prompts are cut and whoever else is there."""
    return stats.settle, stats.draft, stats.accepted, stats.tokens, stats.free


def alone(model: HybridForCausalLM, ask: Ask, adapter: DraftAdapter | None = None) -> tuple[list[int], Ledger]:
    """What `generate` or `infill` makes of a request, and at what cost."""
    options, ids = dict(ask.options), torch.tensor([ask.ids])
    if adapter is not None and options["mode"] != "ar":
        options["draft_adapter"] = adapter
    options |= {"generator": torch.Generator().manual_seed(ask.seed), "return_dict_in_generate": True}
    if options["mode"] == "infill":
        del options["mode"]
        output: Any = model.infill(ids, **options)
        return output.sequences[0].tolist(), ledger(output.stats.rows[0])
    output = model.generate(ids, **options)
    return output.sequences[0, len(ask.ids) :].tolist(), ledger(output.stats.rows[0])


def together(session: Session, asks: Sequence[Ask]) -> list[Done]:
    """What becomes of each of `asks` in a session, in their order."""
    found: dict[int, Done] = {}
    number: dict[int, int] = {}  # of each request, in the order in which they join
    for step in range(3000):
        for i, ask in enumerate(asks):
            if i not in number and ask.arrives <= step:
                number[i] = session.admit(ask.request)
            if i in number and ask.cancelled == step and number[i] not in found:
                found[number[i]] = session.cancel(number[i])
        for done in session.step():
            assert done.index not in found
            found[done.index] = done
        if len(number) == len(asks) and not session.active and not session.waiting:
            return [found[number[i]] for i in range(len(asks))]
    raise AssertionError(f"{session.active} texts are under way for ever, and {session.waiting} wait")


def check(model: HybridForCausalLM, crowd: Crowd, budget: int = PLENTY) -> None:
    """Each request of a crowd gets what it gets alone; one that is taken back, a beginning of it."""
    adapter = adapter_of(model) if crowd.adapted else None
    session = Session(model, slots=crowd.slots, prefill=crowd.prefill, budget=budget, draft_adapter=adapter)
    for ask, done in zip(crowd.asks, together(session, crowd.asks), strict=True):
        assert done.error is None
        text, cost = alone(model, ask, adapter)
        if ask.cancelled is None:
            assert (done.tokens, ledger(done.stats)) == (text, cost)
        assert done.tokens == text[: len(done.tokens)]


def most_needed(model: HybridForCausalLM, asks: Sequence[Ask]) -> int:
    """Slots of a cache that the largest of the requests takes."""
    return max(needed(row_of(model, ask.request, 0, {})) for ask in asks)


@functools.cache
def model_for(clean: str, prediction: str, seed: int = 2) -> HybridForCausalLM:
    return tiny(seed, peaked=0.4, clean_attention=clean, diffusion_prediction=prediction)


@functools.cache
def adapter_of(model: HybridForCausalLM) -> DraftAdapter:
    """One that changes drafts a good deal."""
    source = torch.Generator().manual_seed(0)
    adapter = DraftAdapter(model, rank=2, targets=("o_proj", "down_proj", "q_proj"), generator=source)
    for up in adapter.up.values():
        up.data = torch.randn(up.shape, generator=source, dtype=up.dtype) / 2
    return adapter


# --- Crowds of all kinds --------------------------------------------------------------------------


def never_nine(ids: Tensor, scores: Tensor) -> Tensor:
    return scores.index_fill(1, torch.tensor([9]), -torch.inf)


def even_sum(ids: Tensor, scores: Any) -> bool:
    """Ends a text, in the end."""
    return ids.shape[1] > 4 and int(ids.sum()) % 4 == 0


REVEALS: list[dict[str, Any]] = [
    {"confidence_threshold": 0.4},
    {"steps_per_block": 2},
    {"reveal": "first_hitting"},
    {"reveal": "random", "steps_per_block": 3},
    {"reveal": "ancestral", "steps_per_block": 2},
    {"reveal": "remdm", "steps_per_block": 3, "remask_strength": 0.5},
]
SPECULATION: list[dict[str, Any]] = [{}, {"block_size": 3}, {"fused": True}, {"fused": True, "block_size": 2}]
SAMPLING: list[dict[str, Any]] = [
    {}, {}, {"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 1.4, "top_p": 0.9},
]  # fmt: skip
PROCESSORS: list[dict[str, Any]] = [
    {}, {}, {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [3, 4, 5, 6]},
    {"logits_processor": [never_nine]},
]  # fmt: skip
STOPS = {"stop_strings": ["d", "ab", "lb"], "tokenizer": character_tokenizer("abcdefghijklmnopqrstu")}
ENDS: list[dict[str, Any]] = [
    {}, {}, {"eos_token_id": 14}, {"eos_token_id": list(range(0, MASK, 3))}, {"stopping_criteria": [even_sum]}, STOPS,
]  # fmt: skip


def options_of(mode: str, clean: str, random: Random) -> dict[str, Any]:
    """Of one text."""
    parts = [{"mode": mode}, random.choice(SAMPLING), random.choice(PROCESSORS)]
    if mode == "speculative":
        parts.append(random.choice(SPECULATION))
    elif mode != "ar":
        parts.append(random.choice(REVEALS))
    if mode in ("block", "infill") and clean != "block":
        parts.append(random.choice([{}, {"block_size": 2}, {"block_size": 6}]))
    if mode != "infill":
        parts += [{"max_new_tokens": random.choice([1, 2, 5, 8, 13, 20])}, random.choice(ENDS)]
        if clean == "full":
            parts.append(random.choice([{}, {"cache": "prefix"}, {"cache": "dual"}]))
    return functools.reduce(dict.__or__, parts)


def ids_of(mode: str, random: Random) -> list[int]:
    ids = [random.randrange(MASK) for _ in range(random.choice([1, 2, 3, 4, 5, 8, 9, 17]))]
    if mode == "infill":
        for _ in range(random.randint(1, 6)):
            ids.insert(random.randint(0, len(ids)), MASK)
    return ids


def ask_of(mode: str, clean: str, random: Random) -> Ask:
    return Ask(
        ids=ids_of(mode, random), options=options_of(mode, clean, random), seed=random.randrange(100),
        arrives=random.randint(0, 7), cancelled=random.choice([None, None, None, None, random.randint(0, 12)]),
    )  # fmt: skip


def crowd_of(modes: Sequence[str], clean: str, random: Random) -> Crowd:
    return Crowd(
        asks=[ask_of(random.choice(modes), clean, random) for _ in range(random.randint(2, 6))],
        slots=random.randint(1, 4), prefill=random.choice([None, 1, 3, 5]), adapted=random.choice([True, False]),
    )  # fmt: skip


# --- A company in which one has trouble -----------------------------------------------------------

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
