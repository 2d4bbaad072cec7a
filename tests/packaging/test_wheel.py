"""The wheel holds what the repository holds, and the source distribution what it takes to build and test it.

All other tests run on an editable install, which hides a file or a sub-package that pyproject.toml forgets.
"""

import json
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

from installing import PIP, run

ROOT = Path(__file__).parents[2]
LIMIT = 40 * 2**20

INSTALLED_AS = {
    "hybrid": "hybrid",
    "sampling": "hybrid/sampling",
    "training": "hybrid/training",
    "evals": "hybrid/evals",
}

IMPORT_EVERYTHING = """
import importlib, importlib.metadata, importlib.util, json, pkgutil, sys
import training
import hybrid
needs = {"hybrid.evals.benchmarks.harness": "lm_eval"}  # of an extra
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


def test_the_wheel_has_every_file_and_no_other(files: list[str], wheel: Path) -> None:
    expected = set()
    for name in files:
        folder, _, rest = name.partition("/")
        if folder in INSTALLED_AS:
            expected.add(f"{INSTALLED_AS[folder]}/{rest}")
    packed = {name for name in ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert packed == expected
    assert "hybrid/py.typed" in packed, "or no checker looks at our types"


def test_the_source_distribution_has_what_it_takes_to_test_and_no_other(files: list[str], sources: Path) -> None:
    of_a_clone_only = (".github/", ".gitignore", ".pre-commit-config.yaml", "MANIFEST.in")
    expected = {name for name in files if not name.startswith(of_a_clone_only)}
    with tarfile.open(sources) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    made = {"PKG-INFO", "setup.cfg", "MANIFEST.in"}
    assert {name for name in packed - made if not name.startswith("hybrid_lm.egg-info/")} == expected


def test_what_is_published_stays_small(files: list[str], sources: Path, wheel: Path) -> None:
    # Weights are empty in the copy that both are built of. They hardly shrink.
    weights = sum((ROOT / name).stat().st_size for name in files if name.endswith(".safetensors"))
    assert weights > 2**20
    assert weights + sources.stat().st_size <= LIMIT
    assert weights + wheel.stat().st_size <= LIMIT


def test_everything_imports_beside_a_folder_of_the_same_name(wheel: Path, tmp_path: Path) -> None:
    installed, project = tmp_path / "installed", tmp_path / "project"
    run(*PIP, "install", "--no-index", "--no-deps", "--target", installed, wheel, cwd=tmp_path)
    (project / "training").mkdir(parents=True)
    (project / "training" / "__init__.py").touch()

    found = json.loads(run(sys.executable, "-c", IMPORT_EVERYTHING, cwd=project, PYTHONPATH=str(installed)))
    assert Path(found.pop("training")).parent == project / "training"
    # The environment has an editable hybrid too, later on the path.
    assert [name for name, file in found.items() if not Path(file).is_relative_to(installed)] == []
    assert {"hybrid", "hybrid.sampling", "hybrid.training", "hybrid.evals"} <= set(found)
