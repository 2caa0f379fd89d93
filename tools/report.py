"""`cspd-run report`: everything that was measured, in one HTML file that needs no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from cspd.engines.errors import CspdError, MissingExtraError
from cspd.runtime.outputs import tool_version
from cspd.tools.bench_results import Results
from cspd.tools.bench_run import JOURNAL, read_lines
from cspd.tools.bench_tables import TABLES, Table
from cspd.tools.evaluate import RESULT, paired_table, score_table

PATH = click.Path(path_type=Path)
PARITY, RUN, GRID = "parity.json", "run.json", "grid.png"
SHOWN_IMAGES = 10


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    caption: str
    data: str
    look: str = ""  # "map": colours that mean something, which dark mode must not change


@dataclass(frozen=True)
class PairRow:
    """The images of one setting, from the same noise as those of the other rows."""

    name: str
    images: list[str]


@dataclass(frozen=True)
class Pairs:
    """Rows of images that belong together column by column."""

    title: str
    rows: list[PairRow]

    @property
    def count(self) -> int:
        """Images per row."""
        return max(len(row.images) for row in self.rows)


@dataclass
class Section:
    """A part of the page."""

    title: str
    anchor: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    plots: list[Picture] = field(default_factory=list)
    pairs: list[Pairs] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    code: str = ""


@dataclass(frozen=True)
class Source:
    """A finished run: its kind, its folder, and what it recorded."""

    kind: str
    folder: Path
    record: dict[str, Any]


def load_sources(paths: Iterable[Path]) -> list[Source]:
    """The runs in `paths`, folders or parity files; CspdError for anything else."""
    found = []
    for path in paths:
        here = [source for source in _sources_in(path)]
        if not here:
            raise CspdError(
                f"{path}: holds no results; expected the folder of cspd-run bench, evaluate or "
                "generate, or the file of cspd-export parity --out"
            )
        found += here
    return found


def _sources_in(path: Path) -> Iterable[Source]:
    if path.is_file():
        record = _read_json(path)
        if record.get("kind") == "parity":
            yield Source("parity", path.parent, record)
        return
    if (path / JOURNAL).is_file():
        yield Source("bench", path, {"lines": read_lines(path / JOURNAL)})
    for name, kind in ((RESULT, "evaluate"), (PARITY, "parity"), (RUN, "run")):
        if (path / name).is_file():
            yield Source(kind, path, _read_json(path / name))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise CspdError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CspdError(f"{path}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise CspdError(f"{path}: not a record of ours")
    return record


def build_report(sources: list[Source], plots: Path | None) -> str:
    """The page for `sources`; the plots are also written to the folder `plots` as PNG.

    Raises CspdError for records whose fields are missing or of another type.
    """
    try:
        return _page(sources, plots)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        names = ", ".join(str(source.folder) for source in sources)
        raise CspdError(
            f"{names}: results are not as this version writes them "
            f"({type(error).__name__}: {error}); make them again"
        ) from error


def _page(sources: list[Source], plots: Path | None) -> str:
    try:
        from cspd.tools import report_page
    except ImportError as error:
        raise MissingExtraError(str(error.name), "report") from error
    makers = {"bench": bench_section, "evaluate": evaluate_section, "parity": parity_section,
              "run": run_section}  # fmt: skip
    order = sorted(sources, key=lambda source: list(makers).index(source.kind))
    sections = [makers[source.kind](source, number, plots) for number, source in enumerate(order)]
    sections.append(provenance_section(order))
    warnings = ["SYNTHETIC: random weights. Images, quality and acceptance rates mean nothing."]
    return report_page.render(
        title="Continuous speculative decoding: measured", sections=sections,
        warnings=warnings if any(_synthetic(source) for source in sources) else [],
    )  # fmt: skip


def _header(source: Source) -> dict[str, Any]:
    return source.record["lines"][0] if source.kind == "bench" else source.record


def _synthetic(source: Source) -> bool:
    header = _header(source)
    return bool(header["synthetic"] if source.kind == "bench" else header["bundle"]["synthetic"])


def data_uri(content: bytes, kind: str) -> str:
    """`content` as a `data:` address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def bench_section(source: Source, number: int, plots: Path | None) -> Section:
    """Tables and figures of a benchmark."""
    from cspd.tools.report_plots import FIGURES, save

    results = Results(source.record["lines"])
    tables = [make(results) for make in TABLES.values()]
    section = Section("Benchmark", f"bench-{number}", tables=[t for t in tables if t.rows])
    for name, draw in FIGURES.items():
        figure = draw(results)
        if figure is not None:
            caption = figure.axes[0].get_title()
            image = save(figure, plots, name)
            look = "map" if figure.axes[0].images else ""
            section.plots.append(Picture(caption, data_uri(image, "image/svg+xml"), look))
    return section


def evaluate_section(source: Source, number: int, plots: Path | None) -> Section:
    """Scores, paired differences and image pairs of an evaluation."""
    record = source.record
    tables = [score_table(record), paired_table(record)]
    section = Section("Quality", f"quality-{number}", tables=[t for t in tables if t.rows])
    seed = record["scores"][0]["config"]["seed"]
    same = [score for score in record["scores"] if score["config"]["seed"] == seed]
    step = max(1, record["n"] // SHOWN_IMAGES)
    indices = range(0, record["n"], step)[:SHOWN_IMAGES]
    rows = [PairRow(s["setting"], _images(source.folder / s["folder"], indices)) for s in same]
    if any(row.images for row in rows):
        section.pairs.append(Pairs("The same noise, another method", rows))
    return section


def _images(folder: Path, indices: Iterable[int]) -> list[str]:
    paths = (folder / f"{index:05d}.png" for index in indices)
    return [data_uri(path.read_bytes(), "image/png") for path in paths if path.is_file()]


def parity_section(source: Source, number: int, plots: Path | None) -> Section:
    """The parity ladder, its worst row per comparison, and how errors grow."""
    from cspd.tools.report_plots import errors_by_step, save

    record = source.record
    verdict = "passed" if record["passed"] else "FAILED"
    section = Section(
        "Parity", f"parity-{number}",
        text=f"The ladder {verdict}: {len(record['rows'])} comparisons with PyTorch.",
        tables=[parity_table(record)],
    )  # fmt: skip
    for rung in ("trajectory", "image"):
        figure = errors_by_step(record, rung)
        if figure is not None:
            caption = figure.axes[0].get_title()
            image = save(figure, plots, f"parity-{rung}")
            section.plots.append(Picture(caption, data_uri(image, "image/svg+xml")))
    return section


def parity_table(record: dict[str, Any]) -> Table:
    """The worst row of every rung, subject and output."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault((row["rung"], row["subject"], row["output"]), []).append(row)
    rows = []
    for key, group in groups.items():
        worst = max(group, key=_badness)
        stats = worst["stats"] or {}
        verdict = "pass" if worst["passed"] else ("FAIL" if worst["gate"] else "would fail")
        figures = [_number(stats.get(name)) for name in ("max_abs", "mean_abs", "p99_abs")]
        unit = "" if worst["unit"] == "relative" else f" {worst['unit']}"
        rows.append([
            *key, *figures, _number(stats.get("cosine"), ".6f"), _number(worst["error"]) + unit,
            _number(worst["tolerance"]), verdict, str(len(group)),
        ])  # fmt: skip
    rows += [[s["rung"], s["subject"], "-", *["-"] * 6, "skipped", "0"] for s in record["skipped"]]
    columns = ("rung", "subject", "output", "max abs", "mean abs", "p99 abs", "cosine", "error",
               "tolerance", "verdict", "comparisons")  # fmt: skip
    notes = {item["reason"] for item in record["skipped"]}
    return Table("Ladder", columns, rows, "Skipped: " + "; ".join(sorted(notes)) if notes else "")


def _badness(row: dict[str, Any]) -> tuple[bool, float]:
    error = float("inf") if row["error"] is None else row["error"]
    return not row["passed"], -error if row["higher_is_better"] else error


def _number(value: float | None, form: str = ".2g") -> str:
    return "-" if value is None else format(value, form)


def run_section(source: Source, number: int, plots: Path | None) -> Section:
    """The pictures of a run of `generate`."""
    record = source.record
    section = Section(
        "Images", f"images-{number}", text=f"{record['law']}; {record['images']} images"
    )
    grid = source.folder / GRID
    if grid.is_file():
        caption = f"{record['config']['method']}, seed {record['config']['seed']}"
        section.pictures.append(Picture(caption, data_uri(grid.read_bytes(), "image/png")))
    return section


def provenance_section(sources: list[Source]) -> Section:
    """Bundles, machines, versions and commands behind the page."""
    rows, commands = [], []
    for source in sources:
        header = _header(source)
        bundle = header["bundle"] if source.kind == "bench" else header["bundle"]["sha256"]
        host = ", ".join(f"{name} {value}" for name, value in header["host"].items())
        commit = header.get("commit") or "-"
        rows.append([source.kind, bundle, f"cspd {header['tool']}", commit, host])
        commands += [header["command"]] if header.get("command") else []
    columns = ("run", "bundle sha256", "tool", "commit", "machine")
    note = f"Page made by cspd {tool_version()}."
    return Section(
        "Where this comes from", "provenance", tables=[Table("Runs", columns, rows, note)],
        code="\n".join(commands),
    )  # fmt: skip


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=PATH, default=Path("report.html"), show_default=True)
@click.option("--plots", type=PATH, help="Also write the plots as PNG to this folder.")
def command(runs: tuple[Path, ...], out: Path, plots: Path | None) -> None:
    """Write one HTML page about RUNS: folders of bench, evaluate, generate; files of parity."""
    page = build_report(load_sources(runs), plots)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(page)
    temporary.replace(out)
    click.echo(f"{out}")


if __name__ == "__main__":
    command()
