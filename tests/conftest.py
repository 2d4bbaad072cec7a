"""Settings of the whole test run, in place before any test module imports a heavy library."""

import gc
import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The libraries read these once, when they are imported or first used; later changes have no effect.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HYBRID_CACHE"] = tempfile.mkdtemp(prefix="hybrid-tests-")
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_DATA_DIR"] = tempfile.mkdtemp(prefix="hybrid-tests-wandb-")
os.environ["WANDB_MODE"] = "offline"

# The first call of a kernel takes longer than Hypothesis grants an example.
settings.register_profile("hybrid", settings.default, deadline=None)
settings.load_profile("hybrid")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first: building and importing the wheel comes last."""
    items.sort(key=lambda item: item.path.parent.name == "packaging")


def pytest_collection_finish() -> None:
    """Looking for garbage among all that was made by the imports takes a tenth of a second a time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Jobs draw no picture at their end, which takes as long as a tiny job itself: tests/training/test_watching.py and
    test_wandb.py look at what is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybrid.training.noise_picture.noise_picture", lambda curves, path: path.write_bytes(b""))
        yield
