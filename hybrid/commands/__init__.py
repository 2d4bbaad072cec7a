"""The `hybrid` command: every subcommand is a function, its options that function's arguments.

Commands import what they need inside their functions, so that help does not wait for torch.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser

from hybrid.commands.options import call, documented, parser_of

COMMANDS: dict[str, str | dict[str, str]] = {
    "quickstart": "quickstart:quickstart",
    "generate": "generate:generate",
    "serve": "serve:serve",
    "eval": {
        "likelihood": "eval.likelihood:likelihood", "ngram": "eval.ngram:ngram", "frontier": "eval.frontier:frontier",
        "compare": "eval.compare:compare", "tasks": "eval.tasks:tasks", "benchmark": "eval.benchmark:benchmark",
        "ceiling": "eval.ceiling:ceiling", "infill": "eval.infill:infill",
    },
    "bench": {
        "decoding": "bench.speed:decoding", "speculation": "bench.speed:speculation", "load": "bench.speed:load",
        "forwards": "bench.speed:forwards", "calibrate": "bench.speed:calibrate", "loading": "bench.speed:loading",
        "training": "bench.training:bench_training", "server": "bench.server:server",
    },
    "convert": "convert:convert",
    "card": "card:card",
    "info": "info:info",
}  # fmt: skip
DEFAULT = {"bench": "decoding"}  # what a group does when no word says it
TRAIN = "Train from a YAML recipe with Lightning: hybrid train fit --config RECIPE (see hybrid train --help)."
ABOUT = "Language models that decode left to right, in blocks, by diffusion and speculatively, with one set of weights."


def command(place: str) -> Callable[..., None]:
    """The function at "module:function" of this package."""
    module, _, function = place.partition(":")
    return getattr(import_module(f"{__name__}.{module}"), function)


def main(arguments: list[str] | None = None) -> None:
    """Run one command line (default: this process's); exits with 2 and one clear line on bad input."""
    given = [_underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if given[:1] == ["train"]:
        from hybrid.commands.train import train

        return _reporting(lambda: train(given[1:]))
    given = _renamed(given)
    options_only = len(given) == 1 or (given[1:] and given[1][:1] == "-" and given[1] not in ("-h", "--help"))
    if given and given[0] in DEFAULT and options_only:
        given.insert(1, DEFAULT[given[0]])
    parser = ArgumentParser(prog="hybrid", description=ABOUT)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subcommands(required=False, dest="command")
    for name, place in COMMANDS.items():
        if isinstance(place, str):
            _add(commands, name, place, given)
        else:
            what = f"Measure a model: {', '.join(place)}."
            group = ArgumentParser(description=f"{what} {DEFAULT[name]} if none is named." if name in DEFAULT else what)
            commands.add_subcommand(name, group, help=group.description)
            inner = group.add_subcommands(required=True, dest="what")
            for word, each in place.items():
                _add(inner, word, each, given if name in given else [])
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
    if not isinstance(found, str):
        found, options = found[options.what], options[options.what]
    return _reporting(lambda: call(command(found), options.as_dict()))


def _add(commands: Any, name: str, place: str, given: list[str]) -> None:
    # Of a command that is not named only the short description can be asked for, and options take long to prepare.
    function = command(place)
    parser = parser_of(function) if name in given else ArgumentParser()
    commands.add_subcommand(name, parser, help=documented(function).short_description)


def _reporting(run: Callable[[], None]) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every file that is read or written says nothing here
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"hybrid: {error}", file=sys.stderr)
        sys.exit(2)


def _renamed(given: list[str]) -> list[str]:
    """`hybrid bench --load 128` of the last version is `hybrid bench load 128` now."""
    options = {f"--{word}": word for word in ("speculation", "load", "forwards", "calibrate", "loading")}
    found = next((i for i, word in enumerate(given) if word.partition("=")[0] in options), None)
    if given[:1] != ["bench"] or found is None:
        return given
    name = given[found].partition("=")[0]
    word = options[name]
    values, rest = _taken(given[1:], name)
    if word == "speculation":
        prompts, rest = _taken(rest, "--prompts")
        values += prompts
    print(f"hybrid bench {name} is `hybrid bench {word}` now; the old way goes with the next version.", file=sys.stderr)
    return ["bench", word, *values, *rest]


def _taken(words: list[str], option: str) -> tuple[list[str], list[str]]:
    """The value of an option, and the words without both."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            behind = i + 1 if equals else i + 2
            return [value] if equals else words[i + 1 : behind], words[:i] + words[behind:]
    return [], words


def _underscored(word: str) -> str:
    """--max-new-tokens is --max_new_tokens."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
