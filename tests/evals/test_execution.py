"""Programs that misbehave in every way that is guarded against, and some that do not."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hybrid.evals.benchmarks import execution, guard
from hybrid.evals.benchmarks.execution import execute

pytestmark = pytest.mark.skipif(
    os.uname().sysname != "Linux" or os.uname().machine not in guard.CALLS, reason="there is no guard for this machine"
)


def reason(program: str, **limits: float) -> str:
    return execute(program, **{"seconds": 20.0, **limits}).reason  # type: ignore[arg-type]


@pytest.mark.parametrize("program", [
    "assert 1 + 1 == 2",
    "import math, re, json, collections, heapq, itertools, random\nassert math.gcd(12, 18) == 6",
    "print('seen by nobody')\nimport sys\nsys.stderr.write('x' * 10**6)",
    "import threading\nfound = []\nt = threading.Thread(target=lambda: found.append(1))\nt.start(); t.join()\n"
    "assert found",
    "assert __name__ != '__main__'",
])  # fmt: skip
def test_what_computes_passes(program: str) -> None:
    found = execute(program, seconds=20)
    assert found.passed and found.reason == "passed"


@pytest.mark.parametrize(("program", "said"), [
    ("assert 1 == 2", "AssertionError"),
    ("nobody", "NameError"),
    ("def f(:", "SyntaxError"),
    ("import sys\nsys.exit(0)", "SystemExit"),
    ("raise SystemExit", "SystemExit"),
    ("import os\nos._exit(0)", "died"),
    ("import os\nos.abort()", "died"),
    ("exit()", "NameError"),
    ("input()", "EOFError"),
    ("import ctypes\nctypes.string_at(0)", "died"),
    ("x = [0]\nwhile True: x = x * 2", "out of memory"),
    ("def f(): f()\nf()", "RecursionError"),
    ("import torch", "ModuleNotFoundError"),
])  # fmt: skip
def test_what_fails_or_leaves_early_does_not_pass(program: str, said: str) -> None:
    found = execute(program, seconds=20, memory=200 << 20)
    assert not found.passed and found.reason == said


ENDLESS = [
    "while True: pass",
    "import time\ntime.sleep(100)",
    "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
]


@pytest.fixture(scope="module")
def ended() -> dict[str, str]:
    """Why each was ended; all at once, since each takes a second."""
    began = time.monotonic()
    with ThreadPoolExecutor() as several:
        found = dict(zip(ENDLESS, several.map(lambda program: reason(program, seconds=0.2), ENDLESS), strict=True))
    assert time.monotonic() - began < 30
    return found


@pytest.mark.parametrize("program", ENDLESS)
def test_what_does_not_end_is_ended(program: str, ended: dict[str, str]) -> None:
    assert ended[program] == "timed out"


@pytest.mark.parametrize("program", [
    "import os\nwhile True: os.fork()",
    "import subprocess\nsubprocess.run(['true'])",
    "import os\nos.execv('/bin/true', ['true'])",
    "import os\nif os.system('true'): raise OSError",
    "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=int).start()",
    "import socket\nsocket.socket()",
    "import os\nos.kill({pid}, 9)",
    "import os\nos.killpg({group}, 9)",
    "open('{folder}/new', 'w')",
    "open('{folder}/kept', 'a')",
    "open('{folder}/kept', 'r+')",
    "open('here', 'w')",
    "import os\nos.open('{folder}/kept', os.O_RDONLY | os.O_TRUNC)",
    "import os\nos.remove('{folder}/kept')",
    "import os\nos.rename('{folder}/kept', '{folder}/moved')",
    "import os\nos.mkdir('{folder}/made')",
    "import os\nos.chmod('{folder}/kept', 0)",
    "import os\nos.truncate('{folder}/kept', 0)",
    "import os\nos.symlink('/', '{folder}/link')",
    "import os\nos.utime('{folder}/kept')",
    "import os\nos.memfd_create('x')",
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
])  # fmt: skip
def test_the_world_stays_as_it_was(program: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    before = (tmp_path / "kept").stat()
    words = {"folder": str(tmp_path), "pid": str(os.getpid()), "group": str(os.getpgrp())}
    for name, value in words.items():
        program = program.replace("{" + name + "}", value)
    assert reason(program) in ("PermissionError", "OSError", "BlockingIOError", "ValueError")
    after = (tmp_path / "kept").stat()
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"] and (tmp_path / "kept").read_text() == "kept"
    assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)


def test_the_tests_can_tell_a_guard_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the guard's own file made a mutant without a filter, the same programs do their harm."""
    source = Path(guard.__file__).read_text()
    broken = tmp_path / "guard.py"
    broken.write_text(source.replace('    call(libc.prctl(22, 2,', '    return call(0 if libc else prctl(22, 2,'))
    assert broken.read_text() != source
    with monkeypatch.context() as patch:
        patch.setattr(guard, "__file__", str(broken))
        assert reason(f"import os\nos.mkdir('{tmp_path}/made')") == "passed"
    assert (tmp_path / "made").exists()


def test_no_network_even_to_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reason(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))") == "PermissionError"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has come
            server.accept()


def test_nothing_of_the_callers_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "42")
    assert reason("import os\nassert not [k for k in os.environ if k != 'LC_CTYPE'], list(os.environ)") == "passed"
    assert reason("import os\nassert not os.listdir('.')") == "passed"


def test_a_machine_without_a_guard_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution.platform, "machine", lambda: "riscv64")
    with pytest.raises(ValueError, match=r"only executed on Linux .*riscv64"):
        execute("pass")


@pytest.mark.parametrize(("limits", "said"), [({"seconds": 0}, "seconds is 0"), ({"memory": 5}, "memory is 5 bytes")])
def test_limits_that_are_none_are_refused(limits: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        execute("pass", **limits)
