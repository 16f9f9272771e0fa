"""The progress display of a run: a live panel in a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_INTERVAL = 5.0  # seconds between progress lines when not a terminal


class Display:
    """Progress over a run's updates, as a context manager.

    With several processes all but one are `silent`, because they would print the same lines.
    """

    def __init__(self, total_updates: int, done: int = 0, silent: bool = False):
        self._console = Console()
        is_live = self._console.is_terminal and not silent
        if (
            not is_live
        ):  # outside a terminal rich would wrap lines at 80 columns, which breaks up paths that people copy
            self._console = Console(width=200, soft_wrap=True, quiet=silent)
        self._total, self._start, self._started = total_updates, done, time.monotonic()
        self._last_plain = 0.0
        self._live: Live | None = None
        if is_live:
            columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "ETA"
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._progress.add_task("updates", total=total_updates, completed=done)
            self._live = Live(self._progress, console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """Prints a line that stays on the screen."""
        self._console.print(text, highlight=False, markup=False)

    def update(self, done: int, place: str, values: dict[str, str]) -> None:
        """Shows the number of finished updates, the place in the run ("stage 3"), and values formatted as text."""
        if self._live:
            self._progress.update(self._task, completed=done, description=place)
            table = Table.grid(padding=(0, 2))
            for name, value in values.items():
                table.add_row(name, value)
            self._live.update(Group(self._progress, table))
            return
        now = time.monotonic()
        if now - self._last_plain < PLAIN_INTERVAL and done < self._total:
            return
        self._last_plain = now
        rate = (done - self._start) / max(now - self._started, 1e-9)
        eta = f"ETA {(self._total - done) / rate:.0f} s" if rate > 0 else ""
        shown = "  ".join(f"{name} {value}" for name, value in values.items())
        self.note(f"{place}  update {done}/{self._total}  {shown}  {eta}")


def printable(text: str) -> str:
    """A text on one line in which control characters stand as their codes, so that a name cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table with a title; columns after the first are aligned to the right."""
    # Text, because rich would take "[red]" in a name for a colour, and "[/]" for an error.
    table = Table(title=Text(printable(title), "table.title"), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(Text(printable(column)), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    wide_console().print(table)


def wide_console() -> Console:
    """The terminal; outside of one, a file of 160 columns, because in a log nothing forces a cell to be cut."""
    console = Console()
    if not console.is_terminal and console.width < 160:
        console = Console(width=160, file=console.file)
    return console
