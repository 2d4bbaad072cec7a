"""Imports run one way: hybrid <- sampling <- evals, and hybrid <- training. Read from the syntax trees."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("hybrid", "sampling", "training", "evals")

# What the modules of each layer may import of ours. The command line stands above everything.
MAY_IMPORT = {
    "hybrid": {"hybrid"},
    "sampling": {"hybrid", "sampling"},
    "evals": {"hybrid", "sampling", "evals"},
    "training": {"hybrid", "training"},
    "commands": {"hybrid", "sampling", "evals", "training", "commands"},
}
# And what these files may besides, inside functions or for type checkers only.
MAY_IMPORT_LAZILY = {
    "hybrid/model.py": {"sampling"},
    "training/callbacks.py": {"sampling", "evals"},
    "training/objectives/rollouts.py": {"sampling"},
    "training/watching/samples.py": {"sampling", "evals"},
}


def layer(parts: tuple[str, ...]) -> str:
    if parts[:2] == ("hybrid", "__main__.py"):
        return "commands"  # what `python -m hybrid` starts
    return parts[1] if parts[0] == "hybrid" and parts[1] in MAY_IMPORT else parts[0]


def imports(node: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, full name, lazy) of everything that is imported under `node`."""
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name, lazy) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = resolve_name("." * node.level + (node.module or ""), package)
        yield from ((node.lineno, f"{module}.{alias.name}", lazy) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from imports(child, package, lazy or function or typing_only)


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        file = path.relative_to(root)
        here = layer(file.parts)
        package = ".".join(file.parts[:-1] if file.parts[0] == "hybrid" else ("hybrid", *file.parts[:-1]))
        for line, name, lazy in imports(ast.parse(path.read_text()), package):
            parts = (*name.split("."), "")
            if parts[0] not in FOLDERS:
                continue
            allowed = MAY_IMPORT[here] | (MAY_IMPORT_LAZILY.get(file.as_posix(), set()) if lazy else set())
            if parts[0] != "hybrid" or layer(parts) not in allowed:
                found.append(f"{file.as_posix()}:{line} imports {name}")
    return found


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("hybrid/cache.py", "import hybrid.sampling"),
        ("hybrid/cache.py", "from hybrid import sampling"),
        ("hybrid/cache.py", "def f():\n    from hybrid.sampling.session import generate"),
        ("hybrid/model.py", "from hybrid.sampling.session import generate"),
        ("hybrid/model.py", "class A:\n    from hybrid import sampling"),
        ("sampling/session.py", "from ..evals import report"),
        ("sampling/session.py", "from hybrid.commands import main"),
        ("sampling/session.py", "if True:\n    import hybrid.training"),
        ("evals/report.py", "import hybrid.training.data as data"),
        ("training/callbacks.py", "from hybrid.evals import report"),
        ("training/callbacks.py", "def f():\n    import evals"),
        ("hybrid/commands/train.py", "from training import data"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("hybrid/model.py", "def generate():\n    from hybrid.sampling.session import decode"),
        ("hybrid/model.py", "if TYPE_CHECKING:\n    from hybrid.sampling import GenerationStats"),
        ("hybrid/commands/train.py", "from hybrid.training import data"),
        ("sampling/session.py", "import hybrid\nfrom hybrid.cache import KVCache\nfrom . import reveal"),
        ("training/callbacks.py", "def f():\n    from hybrid import evals, sampling"),
        ("training/data.py", "import evaluate, training_tools"),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    assert violations(tmp_path) == []


def test_a_python_started_in_any_folder_of_ours_finds_its_own_modules_and_the_dependencies() -> None:
    """The folder it is started in comes first on its path."""
    needed = {re.split(r"[^\w.-]", name, maxsplit=1)[0] for name in requires("hybrid-lm") or ()}
    taken = set(sys.stdlib_module_names)
    for name, distributions in packages_distributions().items():
        if not needed.isdisjoint(found.lower().replace("_", "-") for found in distributions):
            taken.add(name)
    assert {"random", "tokenizers", "yaml"} <= taken
    ours = (path for folder in FOLDERS for path in (ROOT / folder).rglob("[!_]*"))
    assert [path for path in ours if path.stem in taken and (path.suffix == ".py" or path.is_dir())] == []


def test_the_model_and_its_decoding_cost_no_heavy_import() -> None:
    code = (
        "import sys, hybrid, hybrid.sampling\n"
        "hybrid.HybridConfig, hybrid.HybridForCausalLM\n"
        "print(*{'lightning', 'wandb', 'datasets', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
