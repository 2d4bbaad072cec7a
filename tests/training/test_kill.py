"""A job that is killed at any moment, while saving too, goes on and ends exactly where an unharmed one does."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import lightning.pytorch as L
import pytest
import tiny_job

STEPS = 16
Run = Callable[..., int | None]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """A function that runs the job in a folder, in a process of its own, and gives its exit code.

    With `after` seconds it is sent `number`, and the code is None if it had ended before.
    """
    server = subprocess.Popen(
        [sys.executable, "-u", tiny_job.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0
    )
    assert server.stdin is not None and server.stdout is not None

    def one(folder: Path, accumulate: int = 1, after: float | None = None, number: int = signal.SIGKILL) -> int | None:
        folder.mkdir(exist_ok=True)
        print(folder, STEPS, accumulate, sep="\t", file=server.stdin, flush=True)
        process = int(server.stdout.readline())
        in_time = after is not None and not select.select([server.stdout], [], [], after)[0]
        if in_time:
            os.kill(process, number)
        code = int(server.stdout.readline())
        return code if in_time or after is None else None

    yield one
    server.stdin.close()
    server.wait(60)


def curve(folder: Path) -> dict[int, str]:
    """Every loss with what random states gave, by sample; what was done twice must have come out the same."""
    # A kill can cut a line short.
    notes = folder / "notes"
    text = notes.read_text() if notes.exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    noted = [line.split(maxsplit=1) for line in lines]
    found = {int(first): rest for first, rest in noted}
    assert all(found[int(first)] == rest for first, rest in noted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_kills_at_random_moments_change_nothing(
    accumulate: int, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each job is killed once, between its first moment and its last, and then resumed.

    `HYBRID_KILLS=50 pytest -m slow tests/training/test_kill.py` kills 50 of each instead of 5.
    """
    kills = int(os.environ.get("HYBRID_KILLS", "5"))
    assert run(tmp_path / "warm-up", accumulate) == 0  # the time to import everything is not the job's
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert run(whole, accumulate) == 0
    seconds = time.monotonic() - began
    expected = curve(whole)
    assert len(expected) == STEPS * accumulate

    moments, done, with_save = Random(), 0, 0
    while done < kills:
        folder = tmp_path / str(moments.random())
        # Each kill has a share of the time to itself: else all of a few may come before the first save.
        code = run(folder, accumulate, after=seconds * (done + moments.random()) / kills)
        if code != -signal.SIGKILL:
            assert code in (None, 0), "faster than the time before: it had ended"
            seconds *= 0.95
            continue
        with_save += (folder / "model.ckpt").exists()
        assert run(folder, accumulate) == 0
        assert curve(folder) == expected
        for name in ("model/model.safetensors", "logs/model/metrics.csv"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        assert {path.name for path in folder.iterdir()} == {"logs", "model", "model.ckpt", "notes"}
        done += 1
        shutil.rmtree(folder)
    assert with_save or kills < 5
    with capsys.disabled():
        print(f"\n{done} of {kills} killed jobs went on ({with_save} from a checkpoint), accumulate={accumulate}")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_job_that_is_asked_to_end_saves_and_goes_on(number: int, code: int, run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "warm-up", 3) == 0
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert run(whole, 3) == 0
    seconds = time.monotonic() - began
    moments = Random()
    for _ in range(60):
        folder = tmp_path / str(moments.random())
        ended = run(folder, 3, after=moments.uniform(0.2 * seconds, seconds), number=number)
        if ended == code and 0 < len(curve(folder)) < STEPS * 3:  # not before it began, nor after its end
            break
    seen = len(curve(folder))
    assert 0 < seen < STEPS * 3 and ended == code
    assert run(folder, 3) == 0
    assert curve(folder) == curve(whole)
    noted = len((folder / "notes").read_text().splitlines())
    assert noted - len(curve(folder)) <= seen % 3, "no whole step is done twice"
    assert (folder / "logs/model/metrics.csv").read_bytes() == (whole / "logs/model/metrics.csv").read_bytes()


class AskedToEnd(L.Callback):
    """Sends the signal of a system that shuts down, once, in the named hook when so many steps are done."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._send)

    def _send(self, trainer: L.Trainer, *given: Any, **more: Any) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unharmed")
    tiny_job.run(folder, 11)
    return folder


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
        "on_validation_batch_start", "on_validation_batch_end", "on_validation_end",
    ],
)  # fmt: skip
def test_wherever_a_job_is_asked_to_end_it_logs_what_it_would_have(hook: str, unharmed: Path, tmp_path: Path) -> None:
    """In the midst of a validation, too, whose figures are those of all its batches."""
    with pytest.raises(SystemExit):
        tiny_job.run(tmp_path, 11, 1, 0.0, AskedToEnd(hook, 5))
    tiny_job.run(tmp_path, 11)
    for name in ("model/model.safetensors", "logs/model/metrics.csv"):
        assert (tmp_path / name).read_bytes() == (unharmed / name).read_bytes()
    assert curve(tmp_path) == curve(unharmed)
