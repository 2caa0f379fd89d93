"""`cspd-run report`: everything that was measured, in one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path

import click

from cspd.engines.errors import MissingExtraError
from cspd.runtime.outputs import tool_version
from cspd.tools.report_sources import Source, load_sources

PATH = click.Path(path_type=Path)
ORDER = ("bench", "evaluate", "parity", "run")


def build_report(sources: list[Source], plots: Path | None) -> str:
    """The page for `sources`; the plots are also written to the folder `plots` as PNG."""
    try:
        from cspd.tools import report_page
        from cspd.tools import report_sections as parts
    except ImportError as error:
        raise MissingExtraError(str(error.name), "report") from error
    order = sorted(sources, key=lambda source: ORDER.index(source.kind))
    sections = [section for number, source in enumerate(order)
                for section in parts.sections_of(source, number, plots)]  # fmt: skip
    cards = [card for source in order for card in parts.cards_of(source)]
    warnings = ["SYNTHETIC: random weights. Images, quality and acceptance rates mean nothing."]
    return report_page.render(
        title="Continuous speculative decoding",
        subtitle=next((parts.subtitle(source) for source in order if source.kind == "bench"), ""),
        cards=cards,
        sections=[*sections, parts.provenance_section(order)],
        warnings=warnings if any(parts.synthetic(source) for source in order) else [],
        footer=f"Made by cspd {tool_version()}. This page loads nothing from anywhere.",
    )


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
