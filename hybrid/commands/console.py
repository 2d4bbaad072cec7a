"""Where the commands print."""

from rich.console import Console


def wide_console() -> Console:
    """The terminal; wide enough for the tables where the output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
