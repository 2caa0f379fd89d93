"""What a build took, graph by graph: time, size and peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table

from cspd.engines.commands import human_bytes
from cspd.export.build_graph import FinishedGraph


def cost_table(finished: Mapping[str, FinishedGraph]) -> Table:
    """A row per graph and one of totals: seconds, error against PyTorch, bytes, peak memory.

    The peak is that of the whole process, with the weights that PyTorch holds.
    """
    flavours = sorted({flavour for item in finished.values() for flavour in item.graph.engines})
    table = Table("graph")
    for column in ("export s", "error vs PyTorch", "peak"):
        table.add_column(column, justify="right")
    for flavour in flavours:
        for column in (f"{flavour} s", "size", "peak"):
            table.add_column(column, justify="right")
    for label, item in finished.items():
        cells = [f"{item.export.seconds:.0f}", f"{item.graph.measured_error:.1e}"]
        cells.append(_bytes(item.export.peak_memory_bytes))
        for flavour in flavours:
            built = item.graph.engines[flavour]
            peak = _bytes(built.peak_memory_bytes)
            cells += [f"{built.seconds:.0f}", human_bytes(built.bytes), peak]
        table.add_row(label, *cells)
    table.add_section()
    table.add_row("all", *_totals(finished, flavours))
    return table


def _totals(finished: Mapping[str, FinishedGraph], flavours: list[str]) -> list[str]:
    """Summed seconds and bytes, largest error and peaks."""
    items = finished.values()
    worst = max(item.graph.measured_error for item in items)
    cells = [f"{sum(item.export.seconds for item in items):.0f}", f"{worst:.1e}"]
    cells.append(_largest(item.export.peak_memory_bytes for item in items))
    for flavour in flavours:
        built = [item.graph.engines[flavour] for item in items]
        cells += [
            f"{sum(engine.seconds for engine in built):.0f}",
            human_bytes(sum(engine.bytes for engine in built)),
            _largest(engine.peak_memory_bytes for engine in built),
        ]
    return cells


def _largest(peaks: Iterable[int | None]) -> str:
    return _bytes(max((peak for peak in peaks if peak is not None), default=None))


def _bytes(size: int | None) -> str:
    return "-" if size is None else human_bytes(size)
