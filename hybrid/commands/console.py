"""Where the commands print, and how they tell how far they are."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def wide_console() -> Console:
    """The terminal; wide enough for the tables where the output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


class Bar(Progress):
    """How far long work is, on stderr: a bar with the time left, or in a log file a line every `seconds`."""

    def __init__(self, shown: bool = True, seconds: float = 30.0) -> None:
        console = Console(file=sys.stderr)
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}")
        drawn = shown and console.is_terminal
        super().__init__(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not drawn)
        self.logged, self.seconds, self.told = shown and not drawn, seconds, time.monotonic()

    def begin(self, description: str, total: float | None = None, completed: float = 0) -> TaskID:
        """A line of its own for work of `total` steps, of which some may be done."""
        return self.add_task(description, total=total, completed=completed, figures="")  # type: ignore[arg-type]

    def tell(self, task: TaskID, completed: float, figures: str = "", **changed: Any) -> None:
        """So many steps are done; `figures` stand beside them. `changed`: "description" or "total"."""
        now = self._tasks[task]
        self.update(task, completed=completed, **changed)
        steps = f"{completed:g}/{now.total:g}" if now.total else f"{completed:g}"
        self.update(task, figures=", ".join(filter(None, [steps, figures])))
        if self.logged and time.monotonic() - self.told >= self.seconds:
            self.told = time.monotonic()
            print(f"{now.description} {now.fields['figures']}", file=sys.stderr, flush=True)
