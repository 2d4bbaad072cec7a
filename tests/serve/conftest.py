import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import NAME, model_of, tokenizer_of

from hybrid.training.callbacks import save_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("served") / NAME
    save_folder(model_of(), tokenizer_of(), found)
    return found


@pytest.fixture(autouse=True)
def log_of_this_test() -> Iterator[None]:
    """Where a test has the server's log written goes with it: servers of later ones would write between the dots."""
    loggers = [logging.getLogger(name) for name in ("hybrid.serve", "uvicorn.error")]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]
    yield
    for each, (handlers, propagate, level) in zip(loggers, before, strict=True):
        each.handlers, each.propagate = handlers, propagate
        each.setLevel(level)
