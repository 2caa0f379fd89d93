"""Tables at any width: nothing lost, nothing too long."""

import contextlib
import io
import os
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from cspd.engines.console.table import Table
from cspd.engines.console.terminal import fitted, print_table

WORDS = st.text("abc 1.", min_size=1, max_size=30).map(str.strip).filter(bool)


@st.composite
def tables(draw):
    width = draw(st.integers(2, 14))
    columns = tuple(f"{draw(WORDS)} {index}" for index in range(width))
    rows = draw(st.lists(st.lists(WORDS, min_size=width, max_size=width), min_size=1, max_size=8))
    return Table("title", columns, rows)


@given(tables(), st.sampled_from((80, 120, 200)))
def test_every_cell_is_shown_once_and_the_first_column_always(table, width):
    shown = list(fitted(table, width))
    (first, *others) = shown
    if len(shown) == 1 and first.columns != table.columns:
        names, *rows = zip(first.columns, *first.rows, strict=True)
        assert (names, [list(row) for row in rows]) == (table.columns, table.rows)
        return
    assert all(part.columns[0] == table.columns[0] for part in shown)
    joined = [list(first.columns), *map(list, first.rows)]
    for part in others:
        for line, more in zip(joined, [part.columns, *part.rows], strict=True):
            line += more[1:]
    assert joined == [list(table.columns), *table.rows]


@given(tables(), st.sampled_from((80, 120)))
def test_no_line_is_longer_than_the_terminal(table, width):
    out = io.StringIO()
    with mock.patch.dict(os.environ, {"COLUMNS": f"{width}"}), contextlib.redirect_stdout(out):
        print_table(table)
    assert max(len(line.rstrip()) for line in out.getvalue().splitlines()) <= width


def test_parts_are_of_about_one_width():
    table = Table("title", tuple("abcdefghi"), [["x" * 20] * 9] * 9)
    assert [len(part.columns) for part in fitted(table, 80)] == [3, 3, 3, 3]


def test_a_table_of_few_rows_is_turned():
    table = Table("title", tuple("abcdefghi"), [["x" * 20] * 9] * 2)
    (turned,) = fitted(table, 80)
    assert turned.columns == ("a", "x" * 20, "x" * 20) and len(turned.rows) == 8


def test_numbers_stand_right_and_headers_break_at_words(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "24")
    print_table(Table("", ("name", "seconds per image"), [["a long name", "1.5"], ["b", "10.25"]]))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-2:] == ["a long name      1.5", "b              10.25"]
    assert [line.split() for line in lines[1:4]] == [["seconds"], ["per"], ["name", "image"]]
