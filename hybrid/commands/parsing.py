"""Command lines from functions: an option is an argument of a command, or a field of an argument that is a group."""

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, get_args, get_origin

import docstring_parser
from jsonargparse import ArgumentParser

COMMANDS = "hybrid.commands"


def command(place: str) -> Callable[..., None]:
    """The function at "module:function" of this package."""
    module, _, function = place.partition(":")
    return getattr(import_module(f"{COMMANDS}.{module}"), function)


def outline(place: str) -> Callable[..., None]:
    """The same function without its body, for help: torch, which the file of a command imports at its top, takes
    seconds. Executed are its signature and what of its file that names: groups of options, and imports of types."""
    module, _, function = place.partition(":")
    spec = find_spec(f"{COMMANDS}.{module}")
    assert spec is not None and spec.loader is not None
    tree = ast.parse(spec.loader.get_source(spec.name))  # type: ignore[attr-defined]  # files have this
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Expr(ast.Constant(ast.get_docstring(node)))]
    places = {name: node for node in tree.body for name in _names(node)}
    needed, waiting = set(), [places[function]]
    while waiting:
        needed.add(node := waiting.pop())
        named = [places[inner.id] for inner in ast.walk(node) if isinstance(inner, ast.Name) and inner.id in places]
        waiting += [other for other in named if other not in needed]
    tree.body = [node for node in tree.body if node in needed]
    found: dict[str, Any] = {"__name__": "outline"}  # what has a dot, jsonargparse imports
    exec(compile(ast.fix_missing_locations(tree), spec.origin or spec.name, "exec"), found)
    return found[function]


def _names(node: ast.stmt) -> list[str]:
    """What a statement at the top of a file defines."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)]


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
