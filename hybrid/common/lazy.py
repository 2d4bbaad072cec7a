"""What is imported when it is needed, as torch and transformers take seconds for which no help should wait; and what
somebody names."""

import ast
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar


def names_of(package: str) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` (PEP 562) of a package whose names lie in other modules: those that it imports under
    `if TYPE_CHECKING:`, by their full names."""
    loader: Any = sys.modules[package].__spec__.loader  # type: ignore[union-attr]
    body = ast.parse(loader.get_source(package)).body
    typed = [node for part in body if isinstance(part, ast.If) for node in part.body]
    where = {name.name: node.module for node in typed if isinstance(node, ast.ImportFrom) for name in node.names}

    def look_up(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(str(where[name])), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up, sorted(where)


F = TypeVar("F", bound=Callable[..., Any])


def function_of(field: str, name: str | F, known: Mapping[str, F]) -> F:
    """A function by its name: one of `known`, or as "package.module.name" in a module of the user's own.

    Raises:
        ValueError: there is none of that name; `field` is what it was given as.
    """
    if not isinstance(name, str):
        return name
    if name in known:
        return known[name]
    place, _, last = name.rpartition(".")
    try:
        found = getattr(import_module(place), last)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(_none_of(field, name, known)) from error
    if not callable(found):
        raise ValueError(_none_of(field, name, known))
    made: F = found
    return made


def _none_of(field: str, name: str, known: Mapping[str, object]) -> str:
    return f"{field} is {name!r}; use one of {list(known)}, or package.module.name of a function of your own."


class _Waiting(MetaPathFinder):
    def __init__(self, module: str, ours: str) -> None:
        self.module, self.ours = module, ours

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_import(module: ModuleType) -> None:
                run(module)
                import_module(self.ours)

            spec.loader.exec_module = run_and_import  # type: ignore[method-assign]
        return spec


def import_with(module: str, ours: str) -> None:
    """Imports `ours` as soon as `module` has been imported, by whomever: now, if it has."""
    if module in sys.modules:
        import_module(ours)
    else:
        sys.meta_path.insert(0, _Waiting(module, ours))
