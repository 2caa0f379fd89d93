"""`cspd-run report`: everything that was measured, in one HTML file that needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from cspd.engines.atomic import check_writable
from cspd.engines.console.commands import (
    OUTPUT,
    Verb,
    finish,
    human_bytes,
    json_option,
    new_out,
    option,
)
from cspd.engines.console.table import Table
from cspd.engines.console.terminal import print_table
from cspd.engines.errors import CspdError, MissingExtraError
from cspd.runtime.store.outputs import tool_version
from cspd.tools.bench.verdict import TITLE
from cspd.tools.report.markdown import markdown
from cspd.tools.report.parts import Card, Section
from cspd.tools.report.sources import Source, load_sources

PATH = click.Path(path_type=Path)
# What reading a record of another form raises; EOFError: kept images that were cut.
WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, EOFError)
ORDER = ("bench", "evaluate", "parity", "run")


@dataclass(frozen=True)
class Report:
    """What is on the page; `plots` is the folder that holds the plots as PNG, if any."""

    subtitle: str
    cards: list[Card]
    sections: list[Section]
    synthetic: bool
    plots: Path | None

    @property
    def verdicts(self) -> list[Table]:
        """Which method to use, a table per benchmark."""
        return [table for part in self.sections for table in part.tables if table.title == TITLE]

    def html(self) -> str:
        """The page."""
        from cspd.tools.report import page as report_page

        warning = "SYNTHETIC: random weights. Images, quality and acceptance rates mean nothing."
        return report_page.render(
            title="Continuous speculative decoding", subtitle=self.subtitle, cards=self.cards,
            sections=self.sections, warnings=[warning] if self.synthetic else [],
            footer=f"Made by cspd {tool_version()}. This page loads nothing from anywhere.",
        )  # fmt: skip


def build_report(sources: list[Source], plots: Path | None) -> Report:
    """The report on `sources`; the plots are also written to the folder `plots` as PNG.

    Raises CspdError for records whose fields are missing or of another type.
    """
    try:
        return _collect(sources, plots)
    except WRONG as error:
        names = ", ".join(str(source.folder) for source in sources)
        raise CspdError(
            f"{names}: results are not as this version writes them "
            f"({type(error).__name__}: {error}); make them again"
        ) from error


def _collect(sources: list[Source], plots: Path | None) -> Report:
    try:
        from cspd.tools.report import page as report_page  # noqa: F401
        from cspd.tools.report import sections as made
    except ImportError as error:
        raise MissingExtraError(str(error.name), "report") from error
    order = sorted(sources, key=lambda source: ORDER.index(source.kind))
    return Report(
        subtitle=next((made.subtitle(source) for source in order if source.kind == "bench"), ""),
        cards=[card for source in order for card in made.cards_of(source)],
        sections=made.sections_of(order, plots),
        synthetic=any(made.synthetic(source) for source in order),
        plots=plots,
    )


def write(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    # JSON may hold half a surrogate pair, which no encoding has.
    temporary.write_text(text, encoding="utf-8", errors="replace")
    temporary.replace(path)


@click.command(
    "report", cls=Verb, example="cspd-run report out/bench-001 out/evaluate-001 --out report.html"
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@option(
    "--out", type=PATH, show_default="out/report-001.html, counting up", group=OUTPUT,
    help="File of the page.",
)  # fmt: skip
@option(
    "--plots", type=PATH, show_default="inside the page only", group=OUTPUT,
    help="Also write the plots as PNG to this folder.",
)  # fmt: skip
@option(
    "--markdown", "text", type=PATH, show_default="none", group=OUTPUT,
    help="Also write the tables, with links to --plots.",
)  # fmt: skip
@json_option
def command(
    runs: tuple[Path, ...], out: Path | None, plots: Path | None, text: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Write one HTML page about RUNS: folders of bench, evaluate, generate; files of parity."""
    for path in (out, text):
        if path is not None:
            check_writable(path)
    report = build_report(load_sources(runs), plots)
    if not as_json:
        for table in report.verdicts:
            print_table(table)
    out = out or new_out("report", ".html")
    write(out, report.html())
    made = [out, *(sorted(plots.glob("*.png")) if plots else [])]
    if text is not None:
        write(text, markdown(report.subtitle, report.sections, plots, text))
        made.append(text)
    record = {"schema": 1, "kind": "report", "runs": [click.format_filename(run) for run in runs]}
    size = human_bytes(out.stat().st_size)
    finish(
        as_json, record, made,
        f"{click.format_filename(out)}: {len(report.sections)} sections, {size}; "
        "next: open it in a browser",
    )  # fmt: skip


if __name__ == "__main__":
    command()
