"""Whether a program that a model wrote passes its tests: run in a process of its own that may do little but compute.

Guarded: CPU and wall-clock time, memory, core dumps; no other process or program can be started, no network or other
socket opened, no file or folder made, changed or removed anywhere, no signal sent, no privilege or limit regained. The
process starts with an empty environment, in an empty folder, with the standard library only (`python -I -S`), no input
and no visible output.

Not guarded: it reads every file that you can read, though nothing of that leaves the process but the name of an
exception; what the kernel itself lets through; and a program that looks for the tests in its own process could cheat
them (it cannot pass by exiting early). For code that may be hostile rather than wrong, use a virtual machine around it.
"""

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hybrid.evals.benchmarks import guard


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: it ran to its end, tests included.
        reason: "passed", "timed out", "out of memory", "died", or the name of the exception that ended it.
    """

    passed: bool
    reason: str


def check_guard() -> None:
    """Raise ValueError where programs cannot be guarded: then none is run."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in guard.CALLS:
        raise ValueError(
            f"code is only executed on Linux (x86_64 or aarch64), where it can be confined; this is {sys.platform} on "
            f"{machine}: leave execution out, or run the evaluation there."
        )


def execute(program: str, *, seconds: float = 10.0, memory: int = 1 << 30) -> Outcome:
    """Run Python source to its end.

    Args:
        program: with its tests behind it, which raise where it fails.
        seconds: of wall-clock and of CPU time.
        memory: bytes of address space.

    Raises:
        ValueError: a limit is out of range, or this machine cannot confine the program, which is then not run.
    """
    check_guard()
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}; it must be above 0.")
    if memory < 64 << 20:
        raise ValueError(f"memory is {memory} bytes; an interpreter alone needs about {64 << 20}.")
    word = secrets.token_hex(16)
    task = {"program": program, "seconds": seconds, "memory": memory, "word": word}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as given:
        given.write(json.dumps(task).encode())
        given.seek(0)
        read, write = os.pipe()
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(Path(guard.__file__)), str(given.fileno()), str(write)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env={},
                pass_fds=(given.fileno(), write), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(write)
        try:
            child.wait(seconds + 1)  # that is for the interpreter to start
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(child)
            with os.fdopen(read, "rb") as result:
                said = result.read(1000).decode(errors="replace")
    if said.startswith("no guard"):
        raise ValueError(f"the program was not run, as it cannot be confined here ({said}).")
    if said == word:
        return Outcome(passed=True, reason="passed")
    if late or child.returncode == -signal.SIGXCPU or (child.returncode == -signal.SIGKILL and not said):
        return Outcome(passed=False, reason="timed out")
    return Outcome(passed=False, reason={"MemoryError": "out of memory", "": "died"}.get(said, said))


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
