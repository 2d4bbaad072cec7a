"""How the commands tell how far they are."""

import pytest

from hybrid.commands.console import Bar


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(seconds=0) as bar:
        task = bar.begin("prompts", 8, completed=2)
        bar.tell(task, 4, "12 tokens/s")
        bar.tell(task, 5, description="grading", total=None)
        other = bar.begin("of unknown length")
        bar.tell(other, 1)
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == ["prompts 4/8, 12 tokens/s", "grading 5/8", "of unknown length 1"]


def test_a_log_is_not_flooded(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        task = bar.begin("prompts", 100)
        for done in range(100):
            bar.tell(task, done)
    assert capsys.readouterr() == ("", "")


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(shown=False, seconds=0) as bar:
        bar.tell(bar.begin("prompts", 8), 4)
    assert capsys.readouterr() == ("", "")
