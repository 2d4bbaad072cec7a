"""What a caller must know of a public name stands with it: types, and in words what each argument is, the shape and
dtype of tensors, and what is raised.

Public are the names of `__all__` with their public methods, and what the command line calls.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType

import pytest

from hybrid.commands import COMMANDS, command
from hybrid.commands.parsing import groups

PACKAGES = ("hybrid", "hybrid.evals", "hybrid.sampling", "hybrid.training")
Function = ast.FunctionDef | ast.AsyncFunctionDef
CLEAR = ("model", "config", "task", "trainer")  # whose types say what they are
SHAPE = re.compile(r"`\[[^\]]*\]`|\b(scalar|see `)")
DTYPE = re.compile(r"\b(bool|int(8|32|64)|float(32|64)?|dtype|see `)")


@dataclass(frozen=True)
class Public:
    """A function with what is said of it: its own docstring, and its class's."""

    name: str
    node: Function
    said: str
    elsewhere: frozenset[str] = frozenset()  # arguments that are described at another place
    inherited: bool = False
    told: bool = False  # errors are shown to a user, and nobody catches them

    @property
    def arguments(self) -> list[ast.arg]:
        found = self.node.args
        every = (*found.posonlyargs, *found.args, *found.kwonlyargs)
        return [x for x in every if x.arg not in ("self", "cls") and x.arg not in self.elsewhere]


@cache
def tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


def node_of(thing: type | FunctionType) -> ast.ClassDef | Function:
    """Where it is defined, as Python's parser has it."""
    found: ast.AST = tree(inspect.getsourcefile(inspect.unwrap(thing)) or "")
    for name in thing.__qualname__.split("."):
        found = next(x for x in ast.iter_child_nodes(found) if getattr(x, "name", None) == name)
    assert isinstance(found, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return found


def sets(method: Function) -> bool:
    """Whether it is the other half of a property."""
    return any(getattr(decorator, "attr", "") == "setter" for decorator in method.decorator_list)


def of_class(name: str, node: ast.ClassDef, thing: type) -> Iterator[Public]:
    about = ast.get_docstring(node) or ""
    for method in node.body:
        if not isinstance(method, Function):
            continue
        if method.name in ("__init__", "__post_init__"):
            yield Public(f"{name}.{method.name}", method, f"{about}\n{ast.get_docstring(method) or ''}".strip())
        elif not method.name.startswith("_") and not sets(method):
            inherited = any(hasattr(base, method.name) for base in thing.__mro__[1:])
            yield Public(f"{name}.{method.name}", method, ast.get_docstring(method) or "", inherited=inherited)


def public() -> Iterator[Public]:
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            thing = getattr(importlib.import_module(package), name)
            if inspect.isclass(thing) and thing.__module__.startswith("hybrid"):
                node = node_of(thing)
                assert isinstance(node, ast.ClassDef)
                yield from of_class(name, node, thing)
            elif inspect.isfunction(thing):
                node = node_of(thing)
                assert not isinstance(node, ast.ClassDef)
                yield Public(name, node, ast.get_docstring(node) or "")
    for places in COMMANDS.values():
        for place in [places] if isinstance(places, str) else places.values():
            node = node_of(command(place))
            assert not isinstance(node, ast.ClassDef)
            shared = frozenset(name for name, _ in groups(command(place)))
            yield Public(f"hybrid {node.name}", node, ast.get_docstring(node) or "", shared, told=True)


def untyped(one: Public) -> list[str]:
    found = one.node.args
    every = [*one.arguments, *(x for x in (found.vararg, found.kwarg) if x)]
    missing = [x.arg for x in every if x.annotation is None]
    return missing + ["what is returned"] * (one.node.returns is None)


def unsaid(one: Public) -> list[str]:
    """What the words leave out. A method that a base class has is described there."""
    if one.inherited:
        return []
    if not one.said:
        return ["a docstring"]
    names = [x.arg for x in one.arguments if x.arg not in CLEAR]
    missing = [name for name in names if len(names) > 1 and not re.search(rf"\b{name}\b", one.said)]
    signature = [ast.unparse(x) for x in (*(a.annotation for a in one.arguments), one.node.returns) if x is not None]
    if any(part in ("Tensor", "torch.Tensor") or "tuple[Tensor" in part for x in signature for part in x.split(" | ")):
        missing += ["a shape"] * (not SHAPE.search(one.said)) + ["a dtype"] * (not DTYPE.search(one.said))
    if raises(one.node) and not one.told and not re.search(r"\b[Rr]aises?\b", one.said):
        missing.append("what is raised")
    return missing


def raises(function: Function) -> bool:
    """Whether it refuses something itself; what a function inside it does is not its own."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and "NotImplemented" not in ast.unparse(node):
            return True
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    return False


def test_every_class_and_function_is_described() -> None:
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            thing = getattr(importlib.import_module(package), name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert ast.get_docstring(node_of(thing)), f"{package}.{name}"


def test_every_public_function_has_types() -> None:
    assert {one.name: untyped(one) for one in public() if untyped(one)} == {}


def test_every_public_function_says_what_a_caller_must_know() -> None:
    assert {one.name: unsaid(one) for one in public() if unsaid(one)} == {}


GOOD = '''
def f(ids: Tensor, size: int) -> Tensor:
    """The ids, int64 `[B, T]`, in parts of `size`. Raises ValueError if there are none."""
    if not size:
        raise ValueError("size")
    return ids
'''


@pytest.mark.parametrize(
    ("right", "wrong", "missing"),
    [
        ("", "", []),
        ("ids: Tensor", "ids", ["ids"]),
        (" -> Tensor", "", ["what is returned"]),
        ("The ids", "They", ["ids"]),
        ("`size`", "them", ["size"]),
        ("`[B, T]`", "", ["a shape"]),
        ("int64", "", ["a dtype"]),
        (" Raises ValueError if there are none.", "", ["what is raised"]),
        (GOOD[GOOD.index('    """') : GOOD.index("    if")], "", ["a docstring"]),
    ],
)
def test_what_is_left_out_is_found(right: str, wrong: str, missing: list[str]) -> None:
    node = ast.parse(GOOD.replace(right, wrong, 1)).body[0]
    assert isinstance(node, ast.FunctionDef)
    one = Public("f", node, ast.get_docstring(node) or "")
    assert untyped(one) + unsaid(one) == missing
