"""setuptools, but for what an editable install leaves in the environment.

Of setuptools, that is a hook, which is asked for `hybrid` only where nothing on the path has that name. In the folder
above a clone that is called `hybrid`, something has: the clone, a folder without __init__.py, passes for a package with
nothing in it. Only a real package on the path is preferred to that, so one is installed, which becomes the clone's. To
put the clone itself on the path would make its `training`, `sampling` and `evals` importable too.
"""

from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from warnings import filterwarnings
from zipfile import ZipFile

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

# In place: another thread that imports `hybrid` meanwhile waits for this very module.
STAND_IN = '''"""Becomes the package of a clone."""

import sys
from importlib.machinery import SourceFileLoader

__path__[:] = [{folder!a}]
__file__ = __spec__.origin = {file!a}
__loader__ = __spec__.loader = SourceFileLoader(__name__, __file__)
__loader__.exec_module(sys.modules[__name__])
'''


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Builds setuptools' wheel with the stand-in instead of the hook, as PEP 660 has it, and returns its name."""
    filterwarnings("ignore", "Editable installation")  # about that hook
    with TemporaryDirectory() as folder:
        name = build_meta.build_editable(folder, config_settings, metadata_directory)
        with ZipFile(Path(folder, name)) as wheel:
            files = {file: wheel.read(file) for file in wheel.namelist() if ".dist-info/" in file}
    package = Path("hybrid").resolve()
    stand_in = STAND_IN.format(folder=str(package), file=str(package / "__init__.py")).encode()
    digest = urlsafe_b64encode(sha256(stand_in).digest()).rstrip(b"=").decode()
    [record] = [file for file in files if file.endswith("/RECORD")]
    rows = [row for row in files[record].decode().splitlines() if ".dist-info/" in row]
    rows.append(f"hybrid/__init__.py,sha256={digest},{len(stand_in)}")
    with ZipFile(Path(wheel_directory, name), "w") as wheel:
        for file, content in (files | {"hybrid/__init__.py": stand_in, record: "\n".join(rows).encode()}).items():
            wheel.writestr(file, content)
    return name
