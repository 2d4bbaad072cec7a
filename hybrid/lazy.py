"""Imports that wait until they are needed: torch and transformers take seconds, for which no help should wait."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def names_of(package: str, places: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` (PEP 562) of a package whose names lie in other modules: {module: names}."""
    where = {name: place for place, names in places.items() for name in names}

    def look_up(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(where[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up, sorted(where)


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
