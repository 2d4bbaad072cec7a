"""Settings of the whole test run, in place before any test module imports a heavy library."""

import gc
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

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


Done = subprocess.CompletedProcess[str]
POOL = ThreadPoolExecutor(1)
THEIRS = (
    "accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test", "generate",
)  # fmt: skip
MEANWHILE = pytest.StashKey[Future[Done]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "meanwhile(command, **options): of subprocess.run; started when the tests begin, and looked at with `done`",
    )
    config.addinivalue_line("markers", "one_in(n): of the cases of a test, every nth is fast, and the others are slow")
    for name in THEIRS:
        config.addinivalue_line("markers", f"{name}: of transformers' own tests, see tests/exact/test_mixin.py")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at which are slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast ones first: building and importing the wheel comes last, and what other processes do meanwhile."""
    seen: Counter[str] = Counter()
    for item in items:
        mark, test = item.get_closest_marker("one_in"), item.nodeid.partition("[")[0]
        if mark is not None and seen[test] % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1
    items.sort(key=lambda x: x.path.parent.name == "packaging" or x.get_closest_marker("meanwhile") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in session.items:
        mark = item.get_closest_marker("meanwhile")
        if mark is not None and not session.config.option.collectonly:
            # One after another, on the core that the tests leave idle.
            item.stash[MEANWHILE] = POOL.submit(
                subprocess.run, *mark.args, **mark.kwargs, capture_output=True, text=True
            )
    # Looking for garbage among all that was made by the imports takes a tenth of a second a time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_sessionfinish() -> None:
    POOL.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def done(request: pytest.FixtureRequest) -> Done:
    """How the test's command ended."""
    return request.node.stash[MEANWHILE].result()


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Jobs draw no picture at their end, which takes as long as a tiny job itself: tests/training/test_watching.py and
    test_wandb.py look at what is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        place = "hybrid.training.watching.noise_picture.noise_picture"
        patch.setattr(place, lambda curves, path: path.write_bytes(b""))
        yield
