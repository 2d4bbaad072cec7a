"""Old names of modules, for one version."""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from hybrid.common.renamed import MOVED, renamed_argument
from hybrid.sampling import Step


@pytest.mark.parametrize("old", MOVED)
def test_what_has_moved_is_there_and_nothing_stands_at_its_old_place(old: str) -> None:
    now = find_spec(MOVED[old])
    assert now is not None and now.name == MOVED[old] and now.origin
    sys.modules.pop(old, None)  # whoever asked for it before has the new one there
    before = find_spec(old)
    assert before is not None and before.origin is None


@pytest.mark.parametrize("old", ["hybrid.folder", "hybrid.sampling.accept", "hybrid.training.stdlib"])
def test_an_old_name_is_the_same_module_and_says_where_it_is_now(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{MOVED[old]} now"):
        module = import_module(old)
    assert module is import_module(MOVED[old]) and module.__spec__.name == MOVED[old]


def test_an_argument_is_taken_by_its_old_name() -> None:
    @renamed_argument("old", "new")
    def double(*, new: int) -> int:
        return 2 * new

    assert double(new=3) == 6
    with pytest.warns(DeprecationWarning, match="old is new now"):
        assert double(old=3) == 6  # type: ignore[call-arg]


def test_an_attribute_is_read_by_its_old_name() -> None:
    step = Step(forward=1, kind="draft", row=0, position=7, settled=[], window=[None], confidence=[1.0])
    with pytest.warns(DeprecationWarning, match="Step.place is position now"):
        assert step.place == 7


def test_nothing_of_ours_uses_an_old_name() -> None:
    names = ["hybrid.commands.train", "hybrid.evals.report", "hybrid.training.cli", "hybrid.sampling"]
    code = f"import hybrid\nfor name in {names}: __import__(name)"
    ran = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:hybrid", "-c", code], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()


@pytest.mark.parametrize("package", ["hybrid", "hybrid.evals", "hybrid.sampling", "hybrid.training"])
def test_no_old_name_of_a_module_hides_a_public_one(package: str) -> None:
    public = {f"{package}.{name}" for name in import_module(package).__all__}
    assert public and public.isdisjoint(MOVED)
