"""A table as text: what a terminal, a page and a Markdown file show of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DASH = "-"


@dataclass(frozen=True)
class Table:
    """A table as text: `rows` hold one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""

    def filled(self) -> Table:
        """The table without columns that hold nothing, as scores do where nothing was scored."""
        if not self.rows:
            return self
        kept = [column for column in range(len(self.columns))
                if any(row[column] != DASH for row in self.rows)]  # fmt: skip
        return Table(
            self.title, tuple(self.columns[k] for k in kept),
            [[row[k] for k in kept] for row in self.rows], self.note,
        )  # fmt: skip

    def markdown(self, under: str = "") -> str:
        """The table in Markdown, its title as a heading unless that is `under`, the one above."""
        lines = [] if self.title == under else [f"### {self.title}", ""]
        lines += [_row(self.columns), _row("---" for _ in self.columns)]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
