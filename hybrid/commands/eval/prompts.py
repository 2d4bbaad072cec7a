"""The prompts that `hybrid eval frontier` knows by name, and how their outputs are graded.

Puzzles are the data section of a recipe, so that what is asked is what that recipe held out of training.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hybrid import HybridForCausalLM
from hybrid.commands.acts import excerpts, recipe
from hybrid.evals.measures import Measure, scored
from hybrid.evals.passes.outputs import Prompt
from hybrid.texts import decode, encode
from hybrid.training.data import HybridData, SudokuData
from hybrid.training.tasks import countdown
from hybrid.training.tasks.questions import CountdownData, ReasoningData, prompt
from hybrid.training.tasks.stdlib import load_stdlib

GIVEN, ASKED = 64, 64  # tokens of a prompt of the standard library, and of its continuation
COUNT = 256  # puzzles

# By name, the packaged recipe that trains for it; "sudoku" are the easier ones of `hybrid quickstart`.
PUZZLES = {"sudoku4": "sudoku.yaml", "sudoku6": "sudoku6.yaml", "countdown": "countdown.yaml"}
NAMES = ("stdlib", "sudoku", *PUZZLES)


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


def source_of(
    name: str, model: HybridForCausalLM, tokenizer: Any, count: int | None, max_new_tokens: int | None
) -> Source:
    """The first `count` prompts of one of `NAMES`, or of a recipe whose answers can be checked: also the config.yaml
    that a training job leaves beside its logs.

    Raises:
        ValueError: no such prompts, or the model or its tokenizer was not made for them.
    """
    if name == "stdlib":
        return _stdlib(model, tokenizer, count, max_new_tokens)
    data = recipe("puzzles", 0).datamodule if name == "sudoku" else data_of(name)
    return _puzzles(name, data, tokenizer, count or COUNT, max_new_tokens)


def data_of(name: str) -> HybridData:
    """The data of a packaged puzzle, or of a recipe. Nothing is made or read yet.

    Raises:
        ValueError: there is no such puzzle or file, or its data section is none.
    """
    if name in PUZZLES:
        text = (files("hybrid.training") / "recipes" / PUZZLES[name]).read_text(encoding="utf-8")
    elif Path(name).suffix in (".yaml", ".yml"):
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(f"prompts: there is no {name!r}; use {', '.join(NAMES)}, or a recipe (.yaml).")
    try:
        section = yaml.safe_load(text)["data"]
        module, _, kind = section["class_path"].rpartition(".")
        found = getattr(import_module(module), kind)
        if not (isinstance(found, type) and issubclass(found, HybridData)):
            raise ValueError(f"prompts: {name}: {section['class_path']} is no HybridData.")
        arguments = section.get("init_args") or {}
        make: Any = found  # its arguments are its own
        return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"prompts: {name} has no usable data section ({type(error).__name__}: {error}).") from error


def _stdlib(model: HybridForCausalLM, tokenizer: Any, count: int | None, max_new_tokens: int | None) -> Source:
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


def _puzzles(name: str, data: HybridData, tokenizer: Any, count: int, max_new_tokens: int | None) -> Source:
    """Held-out questions whose answers are checked, never compared with one solution."""
    pairs: list[tuple[str, str]]
    score: Callable[[str, str, str], float]
    options: dict[str, Any] = {}
    if isinstance(data, SudokuData):
        sudoku = data.sudoku
        pairs = [(p[: sudoku.prompt_length], p[sudoku.prompt_length :]) for p in data.test(count)]
        score, length = (lambda given, output, target: float(sudoku.solved(given + output))), sudoku.cells
        said = f"share of {sudoku.side}x{sudoku.side} puzzles of which every cell is right"
        options = {"eos_token_id": []}
    elif isinstance(data, CountdownData):
        pairs, length = data.test(count), data.answer_length
        score = lambda given, output, target: float(countdown.solved(given + output))  # noqa: E731
        said = "share of expressions that use each number once and make the target"
    elif isinstance(data, ReasoningData):
        entries = {prompt(entry): entry for entry in data.test(count)}
        pairs, length = [(question, str(entry["answer"])) for question, entry in entries.items()], data.answer_tokens()
        score = lambda given, output, target: data.gym.score(output, entries[given])  # noqa: E731
        said = f"mean score of reasoning-gym's own scorer for {data.gym.name}"
    else:
        raise ValueError(f"prompts: {name} trains on {type(data).__name__}, which has no answers that can be checked.")
    prompts = [
        Prompt(ids=encode(tokenizer, given, f"prompts: {name}"), text=given, target=answer) for given, answer in pairs
    ]
    for one in prompts:
        if decode(tokenizer, one.ids) != one.text:
            raise ValueError(f"prompts: the model's tokenizer does not give {name}'s back; it was not made for them.")
    return Source(
        prompts=prompts, max_new_tokens=max_new_tokens or length, quality="solved",
        measures={"solved": scored(score, "solved", said, targets=False)}, options=options,
    )  # fmt: skip
