"""Tables of a benchmark about time: by network, and the first batch against the later ones."""

from __future__ import annotations

from cspd.engines.console.table import DASH, Table
from cspd.runtime.commands.tables import ratio_text
from cspd.tools.bench.cells import name_of, percent
from cspd.tools.bench.plan import Point
from cspd.tools.bench.results import Results, Summary
from cspd.tools.settings import setting_name

# Columns of the table of times, and the graphs behind each.
PARTS = {
    "target transformer": ("target/backbone",),
    "target head": ("target/denoiser", "target/speculative", "target/head_modulation"),
    "draft transformer": ("draft/backbone",),
    "draft head": ("draft/denoiser", "draft/speculative", "draft/head_modulation"),
    "pixels": ("decoder",),
}


def time_table(results: Results) -> Table:
    """Where the time goes: by network and outside, and memory, of all methods and peers."""
    rows = []
    shown = {item.point.id: item for tag in ("readme", "peers") for item in results.serving(tag)}
    for item in shown.values():
        rows.append([
            name_of(item), item.point.backend, f"{item.seconds * 1e3:.0f}",
            DASH if item.cpu_seconds is None else f"{item.cpu_seconds * 1e3:.0f}",
            *(_part(item, starts) for starts in PARTS.values()), percent(item.host),
            f"{item.peak_memory_mb:.0f}", str(item.batches),
        ])  # fmt: skip
    columns = (
        "method",
        "backend",
        "all",
        "CPU time",
        *PARTS,
        "outside",
        "peak memory, MB",
        "batches",
    )
    skips = {line["backend"]: line["reason"] for line in results.lines[1:]
             if line["kind"] == "skip"}  # fmt: skip
    note = "Milliseconds per image, in brackets calls per batch; outside: the host's share."
    note += "".join(f" {backend} skipped: {why}." for backend, why in skips.items())
    return Table("Where the time goes", columns, rows, note)


def _part(item: Summary, starts: tuple[str, ...]) -> str:
    names = [name for name in item.graphs if name.startswith(starts)]
    if not names:
        return DASH
    milliseconds = seconds_in(item, starts) * 1e3
    return f"{milliseconds:.0f} ({sum(item.calls[name] for name in names):.0f})"


def seconds_in(item: Summary, starts: tuple[str, ...]) -> float:
    """Seconds per image in the graphs whose names start so."""
    return sum(value for name, value in item.graphs.items() if name.startswith(starts))


def start_table(results: Results) -> Table:
    """Cold and warm: the first batch of a method on a backend against the later ones."""
    rows = []
    for line in results.lines[1:]:
        if line["kind"] != "batch" or line["repeat"] >= 0 or not results.batches(line["point"]):
            continue
        item, images = results.summary(results.points[line["point"]]), line["images"]
        first = line["cpu_seconds"] if results.by_processor_time else line["seconds"]
        rows.append([
            item.point.backend, _whole_name(item, results.main), str(images),
            f"{line['seconds']:.2f}", f"{item.seconds * images:.2f}",
            ratio_text(first / (results.cost(item) * images), 1),
        ])  # fmt: skip
    columns = ("backend", "method", "batch", "first batch, s", "later batches, s",
               "cold / warm")  # fmt: skip
    starts = [line for line in results.lines[1:] if line["kind"] == "start"]
    note = "; ".join(f"{line['backend']}: sessions opened in {line['seconds']:.2f} s "
                     f"({line['which']})" for line in starts)  # fmt: skip
    return Table("Cold and warm", columns, rows, note)


def _whole_name(item: Summary, main: Point) -> str:
    """With the guidance and whatever else differs from `main`: each is a start of its own."""
    return setting_name(item.point.config, main.config, ("batch_size", "backend"))
