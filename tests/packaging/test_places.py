"""`hybrid` is imported from every working directory, whatever the clone is called, and nothing else of the clone is.

In the folder above a clone that is called `hybrid`, the clone passes for an empty package of that name. In the clone,
hybrid/ comes before an installed package, and the folders of its sub-packages stand beside it.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from venv import EnvBuilder

import pytest
from installing import PIP, run

# Prints where `hybrid` and its sub-packages are found, and what else of the clone can be imported. What makes
# `import hybrid` take seconds does not matter here.
FIND = """
import os, sys
from importlib.util import find_spec
from types import ModuleType

for name in ("backbone", "cache", "config", "layout", "model"):
    sys.modules[f"hybrid.{name}"] = module = ModuleType(name)
    module.__getattr__ = lambda name: None
import hybrid

print(hybrid.__file__)
for name in ("hybrid.sampling", "hybrid.training", "hybrid.evals"):
    print(find_spec(name).origin)
for name in ("sampling", "training", "evals", "backend"):
    spec = find_spec(name)
    if spec and (spec.origin or "").startswith(os.environ["CLONE"]):
        print(name)
"""
SPAWN = """
import multiprocessing, sys
child = multiprocessing.get_context("spawn").Process(target=exec, args=(sys.argv[1], {}))
child.start()
child.join()
sys.exit(child.exitcode)
"""


def installed(folder: Path, *what: str | Path) -> Path:
    """The Python of a new environment that has `what`, and behind it the packages of this environment."""
    EnvBuilder(symlinks=True).create(folder)
    python, [packages] = folder / "bin" / "python", folder.glob("lib/python*/site-packages")
    (packages / "these.pth").write_text("\n".join(entry for entry in sys.path if entry.endswith("-packages")))
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(*PIP, "--python", python, "install", *offline, *what, cwd=folder)
    return python


@pytest.fixture(scope="module")
def ordinary(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("ordinary"), wheel)


@dataclass(frozen=True, kw_only=True)
class Clone:
    """A clone, a Python that has `hybrid`, and what FIND prints there, and in the clone itself.

    What a Python finds in its own folder does not depend on any installation.
    """

    folder: Path
    python: Path
    expected: list[str]
    expected_here: list[str]

    def found(self, *command: str | Path, cwd: Path) -> list[str]:
        settings = {"CLONE": str(self.folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return run(self.python, *command, cwd=cwd, **settings).splitlines()


@pytest.fixture(scope="module")
def cloned(
    request: pytest.FixtureRequest, clone: Path, ordinary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Clone:
    kind, name = request.param
    work = tmp_path_factory.mktemp(kind)
    folder = work / "above" / name
    shutil.copytree(clone, folder, copy_function=os.link)
    python = installed(work / "environment", "-e", folder) if kind == "editable" else ordinary
    [packages] = python.parents[1].glob("lib/python*/site-packages")
    in_clone = [str(folder / part / "__init__.py") for part in ("hybrid", "sampling", "training", "evals")]
    in_wheel = [str(packages / "hybrid" / part / "__init__.py") for part in ("", "sampling", "training", "evals")]
    return Clone(
        folder=folder,
        python=python,
        expected=in_clone if kind == "editable" else in_wheel,
        expected_here=[*in_clone, "sampling", "training", "evals", "backend"],
    )


CALLED_HYBRID = [("editable", "hybrid"), ("ordinary", "hybrid")]
CALLED_OTHERWISE = [("editable", "x y"), ("ordinary", "x y")]
in_clones_called_hybrid = pytest.mark.parametrize("cloned", CALLED_HYBRID, indirect=True, ids=" ".join)


@pytest.mark.parametrize("cloned", CALLED_HYBRID + CALLED_OTHERWISE, indirect=True, ids=" ".join)
def test_in_every_folder(cloned: Clone, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()  # a user's, and no package
    folders = ("docs", "evals", "hybrid", "sampling/reveal", "tests", "training")
    for cwd in (cloned.folder.parent, tmp_path, *(cloned.folder / name for name in folders)):
        assert cloned.found("-c", FIND, cwd=cwd) == cloned.expected, cwd
    assert cloned.found("-c", FIND, cwd=cloned.folder) == cloned.expected_here


@in_clones_called_hybrid
def test_in_a_script_beside_the_clone(cloned: Clone, tmp_path: Path) -> None:
    script = cloned.folder.parent / "script.py"
    script.write_text(FIND)
    assert cloned.found(script, cwd=tmp_path) == cloned.expected


@in_clones_called_hybrid
def test_in_spawned_processes(cloned: Clone) -> None:
    assert cloned.found("-c", SPAWN, FIND, cwd=cloned.folder.parent) == cloned.expected
    assert cloned.found("-c", SPAWN, FIND, cwd=cloned.folder) == cloned.expected_here


@in_clones_called_hybrid
def test_under_pytest(cloned: Clone) -> None:
    test = cloned.folder / "tests" / "test_place.py"
    test.write_text(f"{FIND}\n\ndef test():\n    pass\n")
    script = cloned.python.with_name("pytest")  # puts its own folder on the path, and not the current one
    script.write_text("from pytest import console_main\n\nconsole_main()\n")
    for start, cwd, expected in (
        ((script,), cloned.folder.parent, cloned.expected),
        ((script,), cloned.folder, cloned.expected),
        (("-m", "pytest"), cloned.folder.parent, cloned.expected),
        (("-m", "pytest"), cloned.folder, cloned.expected_here),
    ):
        said = cloned.found(*start, "-s", "--noconftest", test, cwd=cwd)
        assert said[: len(expected)] == expected and said[-1].startswith("1 passed"), said
