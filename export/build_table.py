"""What a build took or will take, graph by graph: time, size and peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich import box
from rich.table import Table

from cspd.engines.console.commands import human_bytes
from cspd.export.build_graph import FinishedGraph
from cspd.export.estimates import Estimate


def cost_table(finished: Mapping[str, FinishedGraph]) -> Table:
    """A row per graph and one of totals: seconds, error against PyTorch, bytes, peak memory.

    The peak is that of the whole process, with the weights that PyTorch holds. Engines of several
    flavours are added up.
    """
    flavours = sorted({flavour for item in finished.values() for flavour in item.graph.engines})
    table = _table(flavours, "error vs\nPyTorch")
    for label, item in finished.items():
        table.add_row(label, *_cells([item], flavours))
    table.add_section()
    table.add_row("all", *_cells(finished.values(), flavours))
    return table


def plan_table(expected: Estimate) -> Table:
    """A row per graph of what a build is estimated to take, and one of totals."""
    flavours = expected.flavours
    table = _table(flavours, title="estimates, scaled from a build that was measured")
    for label, cost in expected.graphs.items():
        cells = [f"{cost.export_seconds:.0f}"]
        cells.append(human_bytes(max(cost.export_memory, cost.engine_memory if flavours else 0)))
        if flavours:
            cells.append(f"{cost.engine_seconds * len(flavours):.0f}")
            cells.append(human_bytes(cost.engine_bytes * len(flavours)))
        table.add_row(label, *cells)
    return table


def _table(flavours: Iterable[str], *columns: str, title: str | None = None) -> Table:
    """An empty table that 80 columns hold."""
    table = Table("graph", box=box.SIMPLE, title=title, title_justify="left")
    engines = ("engine\ns", "size") if flavours else ()
    for column in ("export\ns", *columns, "peak\nmemory", *engines):
        table.add_column(column, justify="right")
    if engines:
        table.caption, table.caption_justify = f"engines: {', '.join(flavours)}", "left"
    return table


def _cells(finished: Iterable[FinishedGraph], flavours: list[str]) -> list[str]:
    """Summed seconds and bytes, largest error and peak of `finished`."""
    items = list(finished)
    built = [item.graph.engines[name] for item in items for name in item.graph.engines]
    peaks = [item.export.peak_memory_bytes for item in items]
    peaks += [engine.peak_memory_bytes for engine in built]
    cells = [
        f"{sum(item.export.seconds for item in items):.0f}",
        f"{max(item.graph.measured_error for item in items):.1e}",
        _largest(peaks),
    ]
    if flavours:
        cells.append(f"{sum(engine.seconds for engine in built):.0f}")
        cells.append(human_bytes(sum(engine.bytes for engine in built)))
    return cells


def _largest(peaks: Iterable[int | None]) -> str:
    known = [peak for peak in peaks if peak is not None]
    return human_bytes(max(known)) if known else "-"
