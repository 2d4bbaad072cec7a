"""Options that several commands share, and command lines from functions: an option is an argument or a field of one."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import docstring_parser
from jsonargparse import ArgumentParser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """How a window is drafted.

    Args:
        block_size: the window of "block" and "speculative" (default: the model's); with --infill, how many slots
            are filled before those behind them (default: in any order).
        sub_block_size: fill a block in parts of this size, one after the other ("block").
        blocks_in_flight: draft so many blocks at once ("block", where clean text attends in blocks).
        fused: "speculative" with one forward a round instead of two.
        drafts_per_round: "speculative" gives a window this many drafts before it is verified.
        reveal: rule that says which drafts are shown after each forward: threshold, factor, entropy_bound, steps,
            random, margin, entropy, leftmost, ancestral, first_hitting, remdm, dream, quota, capped.
        confidence_threshold: show drafts that the model is at least this sure of ("block", "diffusion").
        confidence_factor: of the rule "factor": higher shows more at once.
        entropy_bound: of the rule "entropy_bound": nats; higher shows more at once.
        steps_per_block: show drafts in this many forwards a window instead ("block", "diffusion").
    """

    block_size: int | None = None
    sub_block_size: int | None = None
    blocks_in_flight: int | None = None
    fused: bool = False
    drafts_per_round: int | None = None
    reveal: str | None = None
    confidence_threshold: float | None = None
    confidence_factor: float | None = None
    entropy_bound: float | None = None
    steps_per_block: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How a token is chosen.

    Args:
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_k: sample from this many likeliest tokens only.
        top_p: sample from the likeliest tokens that make up this probability only.
        min_p: sample from tokens at least this likely, relative to the likeliest, only.
        repetition_penalty: above 1, tokens that are in the text already become less likely.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """How a model is asked a benchmark's questions.

    Args:
        model: folder of a trained model, hub name or shipped model.
        mode: how answers are written (default: ar where the model can, else block).
        options: more options of generate, as name=value separated by commas: confidence_threshold=0.8,block_size=4
        likelihood: how given answers are scored: "ar" exactly, "block" or "masked" by a bound (default: as the model
            was trained, exactly where it can be).
        likelihood_block_size: window of --likelihood block (default: the model's).
        samples: mask draws an answer, for the bounds; the error falls with their square root.
        limit: only this many questions of each.
        batch_size: questions at once; it changes no result.
        seed: of masks and sampling.
        out: file for all figures, settings and answers, as JSON.
    """

    model: str = "hybrid-stdlib"
    mode: Literal["ar", "block", "diffusion", "speculative", "auto"] | None = None
    options: str = ""
    likelihood: Literal["ar", "block", "masked"] | None = None
    likelihood_block_size: int | None = None
    samples: int = 32
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    out: Path | None = None

    def check(self) -> None:
        """
        Raises:
            ValueError: nothing would be asked.
        """
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; ask at least one question, or leave it out for all.")


def given(group: Any) -> dict[str, Any]:
    """The options of a group that say something: for `generate`."""
    return {name: value for name, value in vars(group).items() if value is not None and value is not False}


def documented(thing: Any) -> Any:
    return docstring_parser.parse(inspect.getdoc(thing) or "")


def groups(function: Callable[..., None]) -> Iterator[tuple[str, type]]:
    """The arguments of a command that are groups of options."""
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(parameter.annotation) and isinstance(parameter.annotation, type):
            yield name, parameter.annotation


def parser_of(function: Callable[..., None]) -> ArgumentParser:
    """A parser with the function's arguments, and the fields of those that are groups of options: a bool that is False
    by default is a plain flag, and a list without a default takes all words that come."""
    doc = documented(function)
    parser = ArgumentParser(description="\n\n".join(x for x in (doc.short_description, doc.long_description) if x))
    together = dict(groups(function))
    things: list[Callable[..., Any]] = [function, *together.values()]
    for thing in things:
        parameters = inspect.signature(thing).parameters
        said = {argument.arg_name: argument.description for argument in documented(thing).params}
        flags = {name for name, p in parameters.items() if p.default is False}
        words = {n for n, p in parameters.items() if p.default is p.empty and get_origin(p.annotation) is list}
        for name in flags:
            parser.add_argument(f"--{name}", action="store_true", help=said.get(name))
        for name in words:
            parser.add_argument(name, nargs="+", type=get_args(parameters[name].annotation)[0], help=said.get(name))
        skip = {*flags, *words, *(together if thing is function else ())}
        if thing is function:
            parser.add_function_arguments(function, skip=skip, as_positional=True)
        else:
            parser.add_class_arguments(thing, skip=skip)
    return parser


def call(function: Callable[..., None], options: dict[str, Any]) -> None:
    """Runs a command with what its parser found."""
    for name, kind in groups(function):
        fields = [field.name for field in dataclasses.fields(kind)]
        options[name] = kind(**{field: options.pop(field) for field in fields})
    function(**options)
