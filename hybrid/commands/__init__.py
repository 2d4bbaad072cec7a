"""The `hybrid` command: every subcommand is a function, its options that function's arguments."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from hybrid.commands.parsing import call, command, documented, outline, parser_of

# Modules of this package with their functions. Help reads them without importing them (see `outline`).
COMMANDS: dict[str, str | dict[str, str]] = {
    "quickstart": "quickstart:quickstart",
    "generate": "generate:generate",
    "serve": "serve:serve",
    "eval": {
        "likelihood": "eval.likelihood:likelihood", "ngram": "eval.likelihood:ngram",
        "frontier": "eval.frontier:frontier", "compare": "eval.compare:compare", "tasks": "eval.tasks:tasks",
        "benchmark": "eval.benchmark:benchmark", "ceiling": "eval.ceiling:ceiling", "infill": "eval.infill:infill",
    },
    "bench": {
        "decoding": "bench.speed:decoding", "speculation": "bench.speed:speculation", "load": "bench.speed:load",
        "forwards": "bench.speed:forwards", "calibrate": "bench.speed:calibrate", "loading": "bench.speed:loading",
        "training": "bench.training:training", "server": "bench.server:server",
    },
    "convert": "checkpoints:convert",
    "card": "checkpoints:card",
    "info": "checkpoints:info",
    "train": {"clip": "recipes:clip", "ablate": "recipes:ablate"},
}  # fmt: skip
DEFAULT = {"bench": "decoding"}  # what a group does when no word says it
GROUPS = {
    "eval": f"Measure a model: {', '.join(COMMANDS['eval'])}.",
    "bench": f"Measure a model: {', '.join(COMMANDS['bench'])}. {DEFAULT['bench']} if none is named.",
    "train": "Train from a YAML recipe with Lightning: hybrid train fit --config RECIPE (see hybrid train --help).",
}
ABOUT = "Language models that decode left to right, in blocks, by diffusion and speculatively, with one set of weights."


def main(arguments: list[str] | None = None) -> None:
    """Run one command line (default: this process's); exits with 2 and one clear line on bad input."""
    given = [_underscored(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if given[:1] == ["train"] and not set(given[1:2]) & set(COMMANDS["train"]):
        if given[1:] in ([], ["-h"], ["--help"]):
            return print(inspect.getdoc(outline("train:train")))
        return _reporting(lambda: command("train:train")(given[1:]))
    given = _renamed(given)
    options_only = len(given) == 1 or (given[1:] and given[1][:1] == "-" and given[1] not in ("-h", "--help"))
    if given and given[0] in DEFAULT and options_only:
        given.insert(1, DEFAULT[given[0]])
    parser = _parser(given)
    chosen = parser.parse_args(given)
    if chosen.version:
        from hybrid import __version__

        return print(__version__)
    if chosen.command is None:
        return parser.print_help()
    found, options = COMMANDS[chosen.command], chosen[chosen.command]
    if not isinstance(found, str):
        found, options = found[options.what], options[options.what]
    return _reporting(lambda: call(command(found), options.as_dict()))


def _parser(given: list[str]) -> ArgumentParser:
    """Of all commands, with the options of those that `given` names."""
    parser = ArgumentParser(prog="hybrid", description=ABOUT)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subcommands(required=False, dest="command")
    for name, place in COMMANDS.items():
        if isinstance(place, str):
            _add(commands, name, place, given)
        else:
            group = ArgumentParser(description=GROUPS[name])
            commands.add_subcommand(name, group, help=group.description)
            inner = group.add_subcommands(required=True, dest="what")
            for word, each in place.items():
                _add(inner, f"{name} {word}", each, given if name in given else [])
    return parser


def _add(commands: Any, words: str, place: str, given: list[str]) -> None:
    # Of a command that is not named only the short description can be asked for, and options take long to prepare.
    function, name = outline(place), words.split()[-1]
    parser = parser_of(function) if name in given else ArgumentParser()
    commands.add_subcommand(name, parser, help=documented(function).short_description)
    parser.prog = f"hybrid {words}"


def _reporting(run: Callable[[], None]) -> None:
    from transformers.utils import logging  # help need not wait for it

    logging.disable_progress_bar()  # a bar for every file that is read or written says nothing here
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"hybrid: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)


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
