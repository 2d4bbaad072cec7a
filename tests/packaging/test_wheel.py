"""The wheel holds what the repository holds.

All other tests run on an editable install, which hides a file or a sub-package that pyproject.toml forgets.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
INSTALLED_AS = {
    "hybrid": "hybrid",
    "sampling": "hybrid/sampling",
    "training": "hybrid/training",
    "evals": "hybrid/evals",
}
PIP = (sys.executable, "-m", "pip", "-q", "--no-input", "--disable-pip-version-check")

IMPORT_EVERYTHING = """
import importlib, importlib.metadata, importlib.util, json, pkgutil, sys
import training
import hybrid
needs = {"hybrid.evals.harness": "lm_eval"}  # of an extra
for module in pkgutil.walk_packages(hybrid.__path__, "hybrid."):
    if module.name not in needs or importlib.util.find_spec(needs[module.name]):
        importlib.import_module(module.name)
metadata = importlib.metadata.distribution("hybrid-lm")
assert metadata.version == hybrid.__version__
[command] = metadata.entry_points
assert command.name == "hybrid" and callable(command.load())
ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("hybrid", "training")}
print(json.dumps({name: module.__file__ for name, module in ours.items()}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files() -> list[str]:
    """Every file of the repository, also what is not committed yet."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: in the checkout, setuptools would add whatever an earlier build left in build/."""
    work = tmp_path_factory.mktemp("wheel")
    for name in files:
        copy = work / "clone" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", work, "./clone", cwd=work)
    [wheel] = work.glob("*.whl")
    return wheel


def test_the_wheel_has_every_file_and_no_other(files: list[str], wheel: Path) -> None:
    expected = set()
    for name in files:
        folder, _, rest = name.partition("/")
        if folder in INSTALLED_AS:
            expected.add(f"{INSTALLED_AS[folder]}/{rest}")
    packed = {name for name in ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert packed == expected


def test_everything_imports_beside_a_folder_of_the_same_name(wheel: Path, tmp_path: Path) -> None:
    installed, project = tmp_path / "installed", tmp_path / "project"
    run(*PIP, "install", "--no-index", "--no-deps", "--target", installed, wheel, cwd=tmp_path)
    (project / "training").mkdir(parents=True)
    (project / "training" / "__init__.py").touch()

    found = json.loads(run(sys.executable, "-c", IMPORT_EVERYTHING, cwd=project, PYTHONPATH=str(installed)))
    assert Path(found.pop("training")).parent == project / "training"
    # The environment has an editable hybrid too. It comes after the path, so it could only fill a gap.
    assert [name for name, file in found.items() if not Path(file).is_relative_to(installed)] == []
    assert {"hybrid", "hybrid.sampling", "hybrid.training", "hybrid.evals"} <= set(found)
