"""What Lightning keeps to itself is used in one file, and by three classes that are made from its own."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import hybrid.training
from hybrid.training.running import innards


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(hybrid.training.__path__, "hybrid.training."):
        yield importlib.import_module(found.name)


def private(tree: ast.AST, own: bool) -> set[str]:
    """Names with one underscore in front that are asked of `self` or `super()` (`own`), or of anything else."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            asked = ast.unparse(node.value)
            if (asked in ("self", "super()")) == own and not asked.startswith(("torch.", "os.")):
                found.add(node.attr)
    return found


def of_lightning(kind: type) -> set[str]:
    """The private names of the classes of Lightning's that `kind` is made from."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith("lightning."):
            found |= set(vars(base)) | private(ast.parse(inspect.getsource(base).lstrip()), own=True)
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - {"_abc_impl"}


def test_nobody_else_asks_lightning_for_what_it_keeps_to_itself() -> None:
    trees = {module.__name__: ast.parse(inspect.getsource(module)) for module in modules()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    asking = {name for name, tree in trees.items() if private(tree, own=False) - ours}
    assert asking == {innards.__name__}


def test_what_classes_made_from_lightnings_override_is_listed() -> None:
    found: dict[str, set[str]] = {}
    for module in modules():
        for name, kind in vars(module).items():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                tree = ast.parse(inspect.getsource(kind))
                defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
                if both := (private(tree, own=True) | defined) & of_lightning(kind):
                    found[name] = both
    assert found == innards.OVERRIDDEN
