"""The monitor of a long run: percentiles, the CSV file, wandb, and that it stops nothing."""

import csv
import os
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from oracles import tiny

from hybrid.evals.timing.monitor import COLUMNS, GenerationMonitor
from hybrid.sampling import GenerateOutput, GenerationStats, RowStats


def call(seconds: float = 2.0, tokens: int = 10, first: float | None = 0.5, mode: str = "ar") -> GenerationStats:
    rows = [RowStats(tokens=tokens, free=1, settle=tokens - 1)]
    return GenerationStats(mode, rows, prefill=1, settle=tokens - 1, time_to_first_token=first, seconds=seconds)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_percentiles_go_over_the_last_calls_and_totals_over_all() -> None:
    monitor = GenerationMonitor(window=100)
    seconds = np.random.default_rng(0).uniform(0.5, 4.0, 250)
    for i, taken in enumerate(seconds):
        monitor.add(call(float(taken), 10 + i, first=float(taken) / 2))
    found = monitor.summary()
    assert found["calls"] == 250 and found["total_output_tokens"] == sum(range(10, 260))
    assert found["total_seconds"] == pytest.approx(seconds.sum())
    last, tokens = seconds[-100:], np.arange(160, 260)
    for name, values in (("latency", last), ("time_to_first_token", last / 2), ("output_tokens", tokens),
                         ("tokens_per_second", tokens / last)):  # fmt: skip
        for level in (50, 90, 99):
            assert found[f"{name}_p{level}"] == pytest.approx(np.percentile(values, level)), (name, level)


def test_what_no_call_measured_is_none_and_counts_for_nothing() -> None:
    monitor = GenerationMonitor()
    assert monitor.summary()["latency_p50"] is None and monitor.summary()["calls"] == 0
    monitor.add(call(first=None))
    assert monitor.summary()["time_to_first_token_p90"] is None
    monitor.add(call(first=0.25))
    assert monitor.summary()["time_to_first_token_p90"] == 0.25


def test_memory_does_not_grow_with_the_calls() -> None:
    monitor, stats = GenerationMonitor(window=50), call()
    for _ in range(100):
        monitor.add(stats)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(2000):
            monitor.add(stats)
        assert tracemalloc.get_traced_memory()[0] - before < 2000
    finally:
        tracemalloc.stop()


def test_what_generate_measured_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "speed.csv"
    monitor = GenerationMonitor(path)
    prompts = torch.randint(1, 20, (2, 4), generator=torch.Generator().manual_seed(0))
    for mode in ("ar", "speculative"):
        out = tiny(0).generate(prompts, mode=mode, max_new_tokens=6, eos_token_id=None, return_dict_in_generate=True)
        assert isinstance(out, GenerateOutput)
        monitor.add(out.stats)
        row = rows_of(path)[-1]  # neither closed nor flushed by hand
        assert tuple(row) == COLUMNS
        assert (row["mode"], row["rows"], row["output_tokens"]) == (mode, "2", "12")
        assert float(row["latency"]) == out.stats.seconds
        assert float(row["tokens_per_second"]) == out.stats.tokens_per_second
        assert float(row["time_to_first_token"]) == out.stats.time_to_first_token
        assert float(row["tokens_per_forward"]) == out.stats.tokens_per_forward
        assert (row["acceptance"] == "") == (mode == "ar")
        forwards = (int(row["prefill"]), int(row["settle"]), int(row["draft"]))
        assert forwards == (out.stats.prefill, out.stats.settle, out.stats.draft)
    assert len(rows_of(path)) == 2
    monitor.close()


def test_a_later_run_goes_on_in_the_file_also_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    for mode in ("ar", "block"):
        with GenerationMonitor(path) as monitor:
            monitor.add(call(mode=mode))
    assert [row["mode"] for row in rows_of(path)] == ["ar", "block"]
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    with GenerationMonitor(path) as monitor:
        monitor.add(call(mode="diffusion"))
    assert [row["mode"] for row in rows_of(path)] == ["ar", "block", "diffusion"]
    assert path.read_text().count("time,mode") == 1


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"csv: .*other\.csv has other columns.*new file"):
        GenerationMonitor(path)
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "speed.csv").touch()
    with GenerationMonitor(tmp_path / "speed.csv") as monitor:
        full, own = os.open("/dev/full", os.O_WRONLY), monitor._file.fileno()
        os.dup2(full, own)
        os.close(full)
        with pytest.warns(RuntimeWarning, match="csv: this call could not be logged .*No space left"):
            monitor.add(call())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            monitor.add(call())
        assert monitor.summary()["calls"] == 2


# --- wandb --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=tmp_path, project="test")
    yield run
    wandb.finish()


def test_wandb_gets_each_call_with_the_percentiles_so_far(run: Any, tmp_path: Path) -> None:
    monitor = GenerationMonitor(run=run, prefix="night")
    for seconds in (1.0, 3.0):
        monitor.add(call(seconds))
    seen = dict(run.summary)
    assert seen["night/latency"] == 3.0 and seen["night/latency_p50"] == 2.0 and seen["night/calls"] == 2
    assert seen["night/mode"] == "ar" and "night/acceptance" not in seen
    wandb.finish()
    wandb.teardown()  # waits until it is written
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"night/tokens_per_second_p99" in log.read_bytes()


def test_a_run_that_fails_is_warned_of_once_and_the_file_goes_on(run: Any, tmp_path: Path) -> None:
    run.finish()  # wandb refuses what is logged to a finished run
    with GenerationMonitor(tmp_path / "speed.csv", run=run) as monitor:
        with pytest.warns(RuntimeWarning, match="run: this call could not be logged .*generation goes on") as caught:
            for _ in range(3):
                monitor.add(call())
        assert len([w for w in caught if "could not be logged" in str(w.message)]) == 1
    assert len(rows_of(tmp_path / "speed.csv")) == 3


def test_a_run_that_comes_back_is_used_again() -> None:
    class Flaky:
        """Stands for a network, which cannot be had to fail and come back."""

        def __init__(self) -> None:
            self.down, self.logged = True, list[dict[str, Any]]()

        def log(self, data: dict[str, Any]) -> None:
            if self.down:
                raise ConnectionError("down")
            self.logged.append(data)

    sink = Flaky()
    monitor = GenerationMonitor(run=sink)
    with pytest.warns(RuntimeWarning, match="ConnectionError: down"):
        monitor.add(call())
    sink.down = False
    monitor.add(call())
    assert [data["generation/calls"] for data in sink.logged] == [2]


# --- Bad input ----------------------------------------------------------------------------------------------


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="window: it is 0"):
        GenerationMonitor(window=0)
    monitor = GenerationMonitor(tmp_path / "speed.csv")
    with pytest.raises(ValueError, match=r"stats: it is a Tensor; .*return_dict_in_generate=True"):
        monitor.add(torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stats: seconds is 0.0, so the call has not finished"):
        monitor.add(call(seconds=0.0))
    monitor.close()
    with pytest.raises(ValueError, match="csv: the monitor was closed"):
        monitor.add(call())
    assert monitor.summary()["calls"] == 0 and rows_of(tmp_path / "speed.csv") == []
