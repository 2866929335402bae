"""Progress bars and tables on the terminal. Bars go to standard error and vanish when it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Report = Callable[[int, int, str], None]

PIPE_COLUMNS = 160  # rich takes 80 where nobody looks, and folds tables into unreadable columns

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """A bar called `title`; the block gets a callback (done, total, text)."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None, text="")

        def report(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, text=text)

        yield report


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table: the first column left-aligned, numbers right-aligned."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*[str(cell) for cell in row])
    out.print(grid)


def notes(lines: tuple[str, ...]) -> None:
    """Policies and warnings about an input, one line each, on standard error."""
    for line in lines:
        err.print(f"note: {line}", markup=False)
