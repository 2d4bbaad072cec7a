"""Where the commands print, and how they tell how far they are."""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from hybrid.common.files import write_whole


def wide_console() -> Console:
    """The terminal; wide enough for the tables where the output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def table(title: str, *headings: str, rows: Iterable[Iterable[str]] = (), words: int = 1) -> Table:
    """A table whose first columns, so many, are words; the others are figures, which stand on the right."""
    columns = [Column(name, justify="left" if i < words else "right") for i, name in enumerate(headings)]
    shown = Table(*columns, title=title, title_justify="left")
    for row in rows:
        shown.add_row(*row)
    return shown


def cell(value: float | None, form: str) -> str:
    """A figure as `format` writes it, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def facts(title: str | None, **values: object) -> Table:
    """A name and a value a line; an underscore is a blank."""
    shown = Table(show_header=False, box=None, title=title)
    for name, value in values.items():
        shown.add_row(name.replace("_", " "), str(value))
    return shown


def write_json(out: Path | None, document: dict[str, Any]) -> None:
    """Writes what a command was told to leave; values that JSON has not as their text."""
    if out is not None:
        write_whole(out, json.dumps(document, indent=1, sort_keys=True, default=str).encode())


def leave(out: Path | None, document: dict[str, Any]) -> None:
    """`write_json`, and says where."""
    write_json(out, document)
    if out is not None:
        wide_console().print(f"Everything: {out}")


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
