"""A copy of the repository, and the wheel that is made of it."""

import shutil
import sys
from pathlib import Path

import pytest
from installing import PIP, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def files() -> list[str]:
    """Every file of the repository, also what is not committed yet."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def clone(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, as setuptools would add to a build whatever an earlier one left in the checkout. Weights, which take
    seconds to pack, are empty in it."""
    clone = tmp_path_factory.mktemp("copy") / "clone"
    for name in files:
        copy = clone / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.suffix == ".safetensors":
            copy.touch()
        else:
            shutil.copy(ROOT / name, copy)
    return clone


@pytest.fixture(scope="session")
def sources(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    work = tmp_path_factory.mktemp("sources")
    run(sys.executable, "-c", "import backend, sys; backend.build_sdist(sys.argv[1])", work, cwd=clone)
    [sources] = work.glob("*.tar.gz")
    return sources


@pytest.fixture(scope="session")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the source distribution, which so must have every file too."""
    work = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", work, sources, cwd=work)
    [wheel] = work.glob("*.whl")
    return wheel
