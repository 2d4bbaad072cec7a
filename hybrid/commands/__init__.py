"""The `hybrid` command: every subcommand is a function, its options that function's arguments."""

import inspect
import sys
from collections.abc import Callable
from typing import Any, get_args, get_origin

import docstring_parser
from jsonargparse import ArgumentParser
from transformers.utils import logging

from hybrid.commands.bench import bench
from hybrid.commands.bench_training import bench_training
from hybrid.commands.benchmark import benchmark
from hybrid.commands.card import card
from hybrid.commands.ceiling import ceiling
from hybrid.commands.compare import compare
from hybrid.commands.convert import convert
from hybrid.commands.evaluate import likelihood
from hybrid.commands.frontier import frontier
from hybrid.commands.generate import generate
from hybrid.commands.infill import infill
from hybrid.commands.info import info
from hybrid.commands.ngram import ngram
from hybrid.commands.quickstart import quickstart
from hybrid.commands.serve import serve
from hybrid.commands.tasks import tasks

COMMANDS: dict[str, Callable[..., None] | dict[str, Callable[..., None]]] = {
    "quickstart": quickstart,
    "generate": generate,
    "serve": serve,
    "eval": {
        "likelihood": likelihood, "ngram": ngram, "frontier": frontier, "compare": compare, "tasks": tasks,
        "benchmark": benchmark, "ceiling": ceiling, "infill": infill,
    },
    "bench": {"decoding": bench, "training": bench_training},
    "convert": convert,
    "card": card,
    "info": info,
}
DEFAULT = {"bench": "decoding"}  # what a group does when no word says it
TRAIN = "Train from a YAML recipe with Lightning: hybrid train fit --config RECIPE (see hybrid train --help)."
ABOUT = "Language models that decode left to right, in blocks, by diffusion and speculatively, with one set of weights."


def main(arguments: list[str] | None = None) -> None:
    """Run one command line (default: this process's); exits with 2 and one clear line on bad input."""
    given = [_underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if given[:1] == ["train"]:
        from hybrid.commands.train import train

        return _reporting(lambda: train(given[1:]))
    options_only = len(given) == 1 or (given[1:] and given[1][:1] == "-" and given[1] not in ("-h", "--help"))
    if given and given[0] in DEFAULT and options_only:
        given.insert(1, DEFAULT[given[0]])
    parser = ArgumentParser(prog="hybrid", description=ABOUT)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subcommands(required=False, dest="command")
    for name, command in COMMANDS.items():
        if callable(command):
            _add(commands, name, command, given)
        else:
            what = f"Measure a model: {', '.join(command)}."
            group = ArgumentParser(description=f"{what} {DEFAULT[name]} if none is named." if name in DEFAULT else what)
            commands.add_subcommand(name, group, help=group.description)
            inner = group.add_subcommands(required=True, dest="what")
            for word, function in command.items():
                _add(inner, word, function, given)
    train_parser = ArgumentParser(description=TRAIN)
    commands.add_subcommand("train", train_parser, help=TRAIN)
    chosen = parser.parse_args(given)
    if chosen.version:
        from hybrid import __version__

        print(__version__)
        return None
    if chosen.command is None:
        parser.print_help()
        return None
    found, options = COMMANDS[chosen.command], chosen[chosen.command]
    if not callable(found):
        found, options = found[options.what], options[options.what]
    return _reporting(lambda: found(**options.as_dict()))


def _add(commands: Any, name: str, function: Callable[..., None], given: list[str]) -> None:
    # Of a command that is not named only the short description can be asked for, and options take long to prepare.
    parser = parser_of(function) if name in given else ArgumentParser()
    commands.add_subcommand(name, parser, help=_parsed(function).short_description)


def _reporting(run: Callable[[], None]) -> None:
    logging.disable_progress_bar()  # a bar for every file that is read or written says nothing here
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"hybrid: {error}", file=sys.stderr)
        sys.exit(2)


def _underscored(word: str) -> str:
    """--max-new-tokens is --max_new_tokens."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _parsed(function: Callable[..., None]) -> Any:
    return docstring_parser.parse(inspect.getdoc(function) or "")


def parser_of(function: Callable[..., None]) -> ArgumentParser:
    """A parser with the function's arguments: a bool that is False by default is a plain flag, and a list without a
    default takes all words that come."""
    doc = _parsed(function)
    about = "\n\n".join(x for x in (doc.short_description, doc.long_description) if x)
    parser = ArgumentParser(description=about)
    parameters = inspect.signature(function).parameters
    said = {argument.arg_name: argument.description for argument in doc.params}
    flags = {name for name, p in parameters.items() if p.default is False}
    words = {n for n, p in parameters.items() if p.default is p.empty and get_origin(p.annotation) is list}
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true", help=said.get(name))
    for name in words:
        parser.add_argument(name, nargs="+", type=get_args(parameters[name].annotation)[0], help=said.get(name))
    parser.add_function_arguments(function, skip={*flags, *words}, as_positional=True)
    return parser
