"""Tables on a terminal of any width, and in a pipe."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

from cspd.tools.bench_tables import Table

UNLIMITED = 1000  # columns


def open_console(table: RichTable) -> tuple[Console, bool]:
    """A console, and whether `table` fits it; in a pipe it is as wide as the table needs."""
    console = Console()
    options = console.options.update(max_width=UNLIMITED)
    needed = Measurement.get(console, options, table).maximum
    if not console.is_terminal:
        console.width = max(console.width, needed)
    return console, needed <= console.width


def print_table(table: Table) -> None:
    """Print `table`, on its side where only that fits."""
    shown = _rich(table.title, table.columns, table.rows)
    console, fits = open_console(shown)
    if not fits and len(table.rows) < len(table.columns) - 1:
        columns, *rows = zip(table.columns, *table.rows, strict=True)
        shown = _rich(table.title, columns, rows)
    console.print(shown)
    if table.note:
        console.print(table.note, highlight=False, soft_wrap=True)


def _rich(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> RichTable:
    shown = RichTable(*columns, title=title)
    for row in rows:
        shown.add_row(*row)
    return shown
