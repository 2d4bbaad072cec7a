"""Speed over days of calls: one row a call, percentiles across the last ones."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hybrid.sampling.stats import GenerationStats

# In the order of the CSV; seconds are `latency` here: the whole call, as its caller waits for it.
COLUMNS = (
    "time", "mode", "rows", "output_tokens", "latency", "tokens_per_second", "time_to_first_token",
    "tokens_per_forward", "acceptance", "prefill", "settle", "draft",
)  # fmt: skip
OF_STATS = (
    "mode", "tokens_per_second", "time_to_first_token", "tokens_per_forward", "acceptance", "prefill", "settle",
    "draft",
)  # fmt: skip
SPREAD = ("tokens_per_second", "time_to_first_token", "latency", "output_tokens")
PERCENTILES = (50, 90, 99)


class Run(Protocol):
    """What is asked of a wandb run."""

    def log(self, data: dict[str, Any], /) -> object: ...


class GenerationMonitor:
    """Writes down what each call of `generate` took, and keeps percentiles over the last `window` calls.

    Memory does not grow: four numbers for each call of the window, 320 kB for 10,000. Each row is in the CSV file as
    soon as `add` returns. A sink that fails is warned of once and tried again with the next call: watching never stops
    what is watched. Calls of `add` must not overlap.

        with GenerationMonitor("speed.csv", run=wandb.init(project="generation")) as monitor:
            monitor.add(model.generate(ids, return_dict_in_generate=True).stats)
    """

    def __init__(
        self, csv: Path | str | None = None, *, run: Run | None = None, window: int = 10_000, prefix: str = "generation"
    ) -> None:
        """`csv`: file to append to, made with its folder if it is missing. `run`: a wandb run, or anything with
        `log(dict)`. `window`: calls that the percentiles go over. `prefix`: of the names in the run.

        Raises ValueError for a window below 1, and for a file that has other columns; OSError if it cannot be written.
        """
        if window < 1:
            raise ValueError(f"window: it is {window}; give the number of calls that percentiles go over, 1 or more.")
        self.run, self.prefix = run, prefix
        self.calls, self.output_tokens, self.seconds = 0, 0, 0.0
        self._recent = np.full((window, len(SPREAD)), np.nan)
        self._warned: set[str] = set()
        self._file: io.FileIO | None = None
        self._torn = False
        if csv is not None:
            self._file, self._torn = _open(Path(csv))

    def __enter__(self) -> GenerationMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the CSV file. Not needed for what is in it; the run stays open for whoever opened it."""
        if self._file is not None:
            self._file.close()

    def add(self, stats: GenerationStats) -> None:
        """Enter one finished call. Raises ValueError for anything but the stats of a finished call, and after `close`.
        """
        if not isinstance(stats, GenerationStats):
            raise ValueError(
                f"stats: it is a {type(stats).__name__}; pass the stats of generate(..., return_dict_in_generate=True)."
            )
        if stats.seconds <= 0:
            raise ValueError(f"stats: seconds is {stats.seconds}, so the call has not finished; add it when it has.")
        if self._file is not None and self._file.closed:
            raise ValueError("csv: the monitor was closed; make a new one, which goes on in the same file.")
        values: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "rows": len(stats.rows),
            "output_tokens": stats.tokens,
            "latency": stats.seconds,
            **{name: getattr(stats, name) for name in OF_STATS},
        }
        seen = [values[name] for name in SPREAD]
        self._recent[self.calls % len(self._recent)] = [np.nan if value is None else value for value in seen]
        self.calls += 1
        self.output_tokens += stats.tokens
        self.seconds += stats.seconds
        if self._file is not None:
            self._try("csv", lambda: self._write(values))
        if self.run is not None:
            log = self.run.log
            # The run has a clock of its own, and None would make a column of text of a number's.
            named = {key: value for key, value in values.items() if key != "time"} | self.summary()
            data = {f"{self.prefix}/{key}": value for key, value in named.items() if value is not None}
            self._try("run", lambda: log(data))

    def summary(self) -> dict[str, float | None]:
        """Totals since the monitor was made, and percentiles over the window.

        `calls`, `total_output_tokens`, `total_seconds` (inside calls); then for each of tokens_per_second (all rows of
        a call together), time_to_first_token and latency (seconds) and output_tokens its `_p50`, `_p90` and `_p99`:
        what so many percent of the calls do not exceed. None where no call measured it.
        """
        found: dict[str, float | None] = {
            "calls": self.calls, "total_output_tokens": self.output_tokens, "total_seconds": self.seconds,
        }  # fmt: skip
        for name, column in zip(SPREAD, self._recent.T, strict=True):
            known = column[~np.isnan(column)]
            levels = np.percentile(known, PERCENTILES).tolist() if len(known) else [None] * len(PERCENTILES)
            found |= {f"{name}_p{level}": value for level, value in zip(PERCENTILES, levels, strict=True)}
        return found

    def _write(self, values: dict[str, Any]) -> None:
        assert self._file is not None
        line = ("\n" if self._torn else "").encode() + _line([values[name] for name in COLUMNS])
        written = self._file.write(line)
        # A full disk takes a part of a line; the next one must not go on in it.
        self._torn = written != len(line)
        if self._torn:
            raise OSError(f"only {written} of {len(line)} bytes could be written")

    def _try(self, sink: str, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # whatever a sink raises, the text that was generated is worth more
            if sink not in self._warned:
                self._warned.add(sink)
                warnings.warn(
                    f"{sink}: this call could not be logged ({type(error).__name__}: {error}); generation goes on, and "
                    "later failures are not mentioned.",
                    RuntimeWarning,
                    stacklevel=3,
                )


def _open(path: Path) -> tuple[io.FileIO, bool]:
    """The file at its end, with a header, and whether its last line was left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = _line(COLUMNS)
    # Unbuffered: what is written is with the system at once, and nothing is left over to be written twice.
    file = io.FileIO(path, "a+")
    size = file.seek(0, io.SEEK_END)
    if not size:
        file.write(header)
        return file, False
    file.seek(0)
    begin = file.read(len(header))
    file.seek(size - 1)
    torn = file.read(1) != b"\n"
    if begin != header:
        file.close()
        raise ValueError(f"csv: {path} has other columns than {', '.join(COLUMNS)}; name a new file.")
    return file, torn


def _line(cells: tuple[str, ...] | list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
