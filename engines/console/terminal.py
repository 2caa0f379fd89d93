"""Tables on a terminal of any width, and in a pipe, which is 80 columns wide as usual."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import accumulate
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from cspd.engines.console.table import DASH, Table

WHOLE = 26  # characters; longer cells are sentences and may be broken
GAP = 2  # characters between two columns


def print_table(table: Table) -> None:
    """Print `table` as wide as the terminal: on its side where that fits, else part by part.

    Cells may hold rich's markup.
    """
    console = Console(highlight=False)
    for part in fitted(table, console.width):
        console.print(f"\n[bold]{escape(part.title)}[/bold]" if part.title else "")
        console.print(_rich(part, console.width))
    if table.note:
        console.print(f"\n{table.note}", markup=False)


def fits(table: Table) -> bool:
    """Whether the terminal is wide enough for `table` as it is."""
    return _width(table) <= Console().width


def fitted(table: Table, width: int) -> Iterator[Table]:
    """`table`, or the same cells in an order that needs no more than `width` characters a line."""
    if _width(table) <= width or len(table.columns) < 3:
        yield table
        return
    turned = _turned(table)
    if len(table.rows) < len(table.columns) - 1 and _width(turned) <= width:
        yield turned
    else:
        yield from _parts(table, width)


def _parts(table: Table, width: int) -> Iterator[Table]:
    """Some columns at a time, each time beside the first one; in parts of about one width."""
    needs = [need + GAP for need in _needs(table)]
    room = width + GAP - needs[0]
    count = len(_cut(needs[1:], room))
    while room > 1 and len(_cut(needs[1:], room - 1)) == count:
        room -= 1
    title, start = table.title, 1
    for taken in _cut(needs[1:], room):
        shown = (0, *range(start, start + taken))
        yield Table(title, tuple(table.columns[k] for k in shown),
                    [[row[k] for k in shown] for row in table.rows])  # fmt: skip
        title, start = f"{table.title}, continued", start + taken


def _cut(needs: list[int], room: int) -> list[int]:
    """How many columns go into every part, as many as `room` holds and one at least."""
    if not needs:
        return []
    taken = max(1, sum(total <= room for total in accumulate(needs)))
    return [taken, *_cut(needs[taken:], room)]


def _turned(table: Table) -> Table:
    columns, *rows = zip(table.columns, *table.rows, strict=True)
    return Table(table.title, columns, [list(row) for row in rows])


def _width(table: Table) -> int:
    return sum(need + GAP for need in _needs(table)) - GAP


def _needs(table: Table) -> list[int]:
    """Characters that every column needs: its cells whole unless they are sentences."""
    return [max(longest_word(name), *map(_need, cells)) if cells else longest_word(name)
            for name, *cells in zip(table.columns, *table.rows, strict=True)]  # fmt: skip


def _need(cell: str) -> int:
    shown = Text.from_markup(cell).plain
    return len(shown) if len(shown) <= WHOLE else max(WHOLE, longest_word(shown))


def longest_word(text: str) -> int:
    """Characters of the longest word of `text`."""
    return max(map(len, text.split()), default=1)


def _rich(table: Table, width: int) -> RichTable:
    needs = _needs(table)
    whole = sum(max(len(name), need) + GAP for name, need in zip(table.columns, needs, strict=True))
    shown = RichTable(box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, need, *cells in zip(table.columns, needs, *table.rows, strict=True):
        header = name if whole <= width else textwrap.fill(name, need, break_long_words=False)
        justify: Literal["left", "right"] = "right" if all(map(_is_number, cells)) else "left"
        shown.add_column(header, min_width=need, justify=justify)
    for row in table.rows:
        shown.add_row(*row)
    return shown


def _is_number(cell: str) -> bool:
    return cell.removeprefix("about ").lstrip("-+")[:1].isdigit() or cell in ("", DASH)
