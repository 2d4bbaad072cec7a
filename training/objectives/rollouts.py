"""Rollouts: what the model writes behind the prompts of a batch, in groups, drawn by its own left-to-right law.

A text is decided by the weights, the seed, its row's number in the stream and its place in the group: neither the batch
nor the number of processes changes it.

Shapes: P prompts, G texts each, T tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from hybrid import HybridForCausalLM
from hybrid.noise import source_of
from hybrid.training.batch import Batch, each
from hybrid.training.text.rows import NOBODY, given_and_learned


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, what the data have behind it, and the number of its row."""

    prompt: list[int]
    reference: list[int]
    index: int


@dataclass(frozen=True, kw_only=True)
class Texts:
    """P times G texts, those of a prompt side by side.

    Attributes:
        questions: `[P]`.
        answers: what was written, `[P G]`, each with the token that ended it.
        batch: prompts and answers as rows to be learned; only answers are targets.
        rounds, gained: of speculation, and the tokens that they gave; 0 where there was none.
    """

    questions: list[Question]
    answers: list[list[int]]
    batch: Batch
    rounds: int
    gained: int


def questions_of(batch: Batch) -> list[Question]:
    """One for each row that is somebody's: what stands before the first token to be learned is given.

    Raises:
        ValueError: a row has several documents, or nothing before what is to be learned.
    """
    found = []
    columns = (batch["input_ids"].tolist(), batch["target"].tolist(), batch["doc"].tolist(), batch["index"].tolist())
    for ids, target, doc, index in zip(*columns, strict=True):
        if index == NOBODY:
            continue
        real = [place for place, number in enumerate(doc) if number >= 0]
        if len({doc[place] for place in real}) > 1:
            raise ValueError(f"row {index} has several documents, and a row is one prompt here: do not pack them.")
        learned = [place for place in real if target[place]]
        prompt = [ids[place] for place in real if not learned or place < learned[0]]
        if not prompt:
            raise ValueError(
                f"row {index} has no prompt, since all of it is to be learned: mark what is given, by labels of -100 "
                "or a target that is False."
            )
        run = [ids[place] for step, place in enumerate(learned) if place == learned[0] + step]
        found.append(Question(prompt=prompt, reference=run, index=index))
    return found


def write(
    model: HybridForCausalLM, batch: Batch, seed: int, *, group: int, max_new_tokens: int | None = None,
    slots: int = 256, **options: Any,
) -> Texts:  # fmt: skip
    """`group` texts behind each prompt of `batch`.

    Args:
        max_new_tokens: None: as many as the row itself has behind its prompt.
        slots: texts at once.
        options: of `hybrid.sampling.decode`: mode, temperature, block_size.

    Raises:
        ValueError: a row has no prompt, or nothing says how long its answer may be.
    """
    # Lazily: the decode loop stands above training.
    from hybrid.sampling import Request, decode_all

    questions = questions_of(batch)
    asked = [(question, member) for question in questions for member in range(group)]
    requests = [
        Request(q.prompt, generator=source_of(seed, q.index, member), max_new_tokens=max_new_tokens or _length_of(q))
        for q, member in asked
    ]
    device = batch["input_ids"].device
    # The law of the weights as they are, so nothing that the model stores for its users, as a top_p, has a say. And no
    # autocast, which the decode loop's own kernels know nothing of.
    with as_for_use(model), _plainly(model), torch.autocast(device.type, enabled=False):
        found, stats = decode_all(model, requests, slots=slots, **options)
    answers, rounds = [done.tokens for done in found], [n for row in stats.rows for n in row.accepted]
    ids, target, doc = given_and_learned([(q.prompt, a) for (q, _), a in zip(asked, answers, strict=True)], pad=0)
    index = torch.tensor([q.index for q, _ in asked], dtype=torch.int64)
    rows = Batch(input_ids=ids.long(), target=target, doc=doc.long(), index=index)
    rows = each(rows, lambda tensor: tensor.to(device))
    return Texts(questions=questions, answers=answers, batch=rows, rounds=len(rounds), gained=sum(rounds))


def _length_of(question: Question) -> int:
    if not question.reference:
        raise ValueError(f"row {question.index} has no answer to take a length from: give max_new_tokens.")
    return len(question.reference)


@contextmanager
def as_for_use(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and not compiled, for shapes that training does not have; afterwards as it was,
    each part in the mode that it had."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _plainly(model: HybridForCausalLM) -> Iterator[None]:
    stored = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=stored.eos_token_id, pad_token_id=stored.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = stored
