"""A ragged load: many texts of unequal lengths, decoded as they come against a batch at a time."""

import random
import statistics
from collections.abc import Callable
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.evals.timing.bench import take_turns
from hybrid.sampling import Request, decode


def ragged_load(
    model: HybridForCausalLM, *, count: int, slots: int, rounds: int, shortest: int = 8, longest: int = 256,
    seed: int = 0, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Tokens a second, median of `rounds` turns, of `count` prompts of `shortest` to `longest` random tokens with
    answers of as many, at most `slots` at once.

    Returns:
        "as they come": a text joins when another ends. "as a batch ends": one batch after the other, whose rows leave
        when they end. "generate": the same batches by `generate`, which knows one length of answer for all.

    Raises:
        ValueError: the context has no room for such texts.
    """
    most = model.config.max_position_embeddings
    if 2 * longest > most:
        raise ValueError(f"longest is {longest}: a prompt and an answer of that length exceed the context of {most}.")
    source = random.Random(seed)
    words = [token for token in range(model.config.vocab_size) if token != model.config.mask_token_id]
    jobs = [
        (source.choices(words, k=source.randint(shortest, longest)), source.randint(shortest, longest))
        for _ in range(count)
    ]  # fmt: skip
    batches = [jobs[at : at + slots] for at in range(0, count, slots)]
    given = {"eos_token_id": [], **options}

    def as_they_come(jobs: list[tuple[list[int], int]]) -> None:
        requests = [Request(ids, max_new_tokens=length) for ids, length in jobs]
        for done in decode(model, requests, slots=slots, **given):
            assert len(done.tokens) == jobs[done.index][1], done.error

    def as_a_batch_ends() -> None:
        for batch in batches:
            as_they_come(batch)

    def generate() -> None:
        for batch in batches:
            width = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in batch])
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch])
            model.generate(ids, mask, max_new_tokens=max(length for _, length in batch), **given)

    runs: dict[str, Callable[[], object]] = {
        "as they come": lambda: as_they_come(jobs), "as a batch ends": as_a_batch_ends, "generate": generate,
    }  # fmt: skip
    tokens = sum(length for _, length in jobs)
    return {name: tokens / statistics.median(times) for name, times in take_turns(runs, rounds).items()}
