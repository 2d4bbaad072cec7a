"""How the tests of packaging install a clone and start a Python somewhere else."""

import os
import subprocess
import sys
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "-q", "--no-input", "--disable-pip-version-check")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What the command prints; it must succeed."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"in {cwd}: {done.stdout}{done.stderr}"
    return done.stdout
