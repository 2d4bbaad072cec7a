"""Settings of the whole test run, in place before any test module imports a heavy library."""

import os
import tempfile

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
