"""The prompts that `hybrid eval frontier` knows by name, and how their outputs are graded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hybrid import HybridForCausalLM
from hybrid.commands.acts import excerpts
from hybrid.evals.measures import Measure, scored
from hybrid.evals.outputs import Prompt
from hybrid.evals.prompts import encoded
from hybrid.training.stdlib import load_stdlib
from hybrid.training.sudoku import ALPHABET, CELLS, PROMPT_LENGTH, sample_puzzles, solved, split_grids

GIVEN, ASKED = 64, 64  # tokens of a prompt of the standard library, and of its continuation


@dataclass(frozen=True, kw_only=True)
class Source:
    """Prompts with what goes with them.

    Attributes:
        max_new_tokens: how far they are continued unless somebody asks for another length.
        quality: the name of their measure unless somebody asks for another.
        measures: more measures, that only these prompts have.
        options: of `generate`.
    """

    prompts: list[Prompt]
    max_new_tokens: int
    quality: str
    measures: dict[str, Measure] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def stdlib(model: HybridForCausalLM, tokenizer: Any, count: int | None, max_new_tokens: int | None) -> Source:
    """Places in the held-out files of Python's standard library, and what follows there."""
    asked = max_new_tokens or ASKED
    given = min(GIVEN, model.config.max_position_embeddings - asked)
    if given < 1:
        raise ValueError(
            f"max_new_tokens is {asked}, and the model's context is {model.config.max_position_embeddings}: ask for "
            "fewer, so that there is room for a prompt."
        )
    found = [p for d in load_stdlib().test for p in excerpts(d, tokenizer, given, asked, 3)]
    return Source(prompts=found[: count or 48], max_new_tokens=asked, quality="edit_similarity")


def sudoku(model: HybridForCausalLM, tokenizer: Any, count: int | None, max_new_tokens: int | None) -> Source:
    """4x4 puzzles with 7 to 11 clues, of grids that training holds out (those of seed 0)."""
    _, held_out = split_grids()
    try:
        tokenizer.encode(ALPHABET, add_special_tokens=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"prompts: sudoku needs a model that knows the characters {ALPHABET!r} ({error}).") from error
    begin = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    found = []
    for puzzle in sample_puzzles(held_out, count or 256, torch.Generator().manual_seed(1), (7, 11)):
        text = puzzle[:PROMPT_LENGTH]
        ids = begin + encoded(text, "prompts: sudoku", tokenizer)
        found.append(Prompt(ids=ids, text=text, target=puzzle[PROMPT_LENGTH:]))
    measure = scored(
        lambda prompt, output, target: float(solved(prompt + output)), "solved",
        "share of held-out puzzles whose 16 cells are all right",
    )  # fmt: skip
    return Source(
        prompts=found, max_new_tokens=max_new_tokens or CELLS, quality="solved", measures={"solved": measure},
        options={"eos_token_id": []},
    )  # fmt: skip


# (model, tokenizer, how many at most, max_new_tokens)
SOURCES: dict[str, Callable[[HybridForCausalLM, Any, int | None, int | None], Source]] = {
    "stdlib": stdlib, "sudoku": sudoku,
}  # fmt: skip
