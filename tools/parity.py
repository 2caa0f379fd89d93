"""`cspd-export parity`: do the exported networks compute what PyTorch computes?

A ladder of comparisons, from one call of one graph up to whole images and accept decisions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from cspd.engines.atomic import check_writable
from cspd.engines.backends import BACKENDS
from cspd.engines.bundle import Bundle, open_bundle
from cspd.runtime.config import make_config
from cspd.runtime.outputs import environment, tool_version
from cspd.tools.parity_bisect import Suspect, bisect
from cspd.tools.parity_ladder import Ladder, candidates
from cspd.tools.parity_measure import ErrorStats, Row, Skipped, finite, worst
from cspd.tools.parity_polygraphy import compare_graphs
from cspd.tools.parity_rungs import RUNGS
from cspd.tools.provenance import command_line, commit
from cspd.tools.terminal import open_console

SCHEMA = 1
COMPARED = [name for name in BACKENDS if name != "torch"]


def make_ladder(
    bundle: Bundle, *, backends: tuple[str, ...] = (), images: int = 2, num_iter: int = 8,
    head_steps: int | None = None, seeds: int = 2, budget: float = 20.0, device: str = "cpu",
) -> Ladder:  # fmt: skip
    """The ladder of `bundle`, with as many denoising steps as it is used with unless given."""
    # PyTorch's convolutions use it by default, the exported graphs do not.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    manifest = bundle.manifest
    values: dict[str, Any] = {**manifest.defaults}
    values["num_iter"] = min(num_iter, manifest.geometry.num_tokens)
    values |= {"head_steps": head_steps} if head_steps else {}
    labels = tuple(range(manifest.geometry.num_classes))
    config = make_config(**values, labels=labels, num_images=images, batch_size=images)
    return Ladder(bundle, config, candidates(backends), seeds, budget, device)


def climb(ladder: Ladder, rungs: Iterable[str]) -> tuple[list[Row], list[Skipped]]:
    """All results of `rungs`, in their order."""
    results = [result for name in rungs for result in RUNGS[name](ladder)]
    rows = [result for result in results if isinstance(result, Row)]
    skipped = [result for result in results if isinstance(result, Skipped)]
    return rows, [*ladder.skipped, *skipped]


def failures(rows: Iterable[Row]) -> list[Row]:
    """The rows that fail and concern what the bundle holds."""
    return [row for row in rows if row.gate and not row.passed]


def to_json(
    ladder: Ladder, rows: list[Row], skipped: list[Skipped], suspects: list[Suspect]
) -> dict[str, Any]:
    """The whole ladder as plain data."""
    return {
        "schema": SCHEMA,
        "kind": "parity",
        "tool": tool_version(),
        "bundle": {"sha256": ladder.bundle.sha256, "synthetic": ladder.bundle.manifest.synthetic},
        "config": ladder.config.model_dump(mode="json"),
        "host": environment(),
        "passed": not failures(rows),
        "rows": [row.to_json() for row in rows],
        "skipped": [vars(item) for item in skipped],
        "suspects": finite([vars(item) for item in suspects]),
    }


def ladder_table(rows: list[Row], skipped: list[Skipped], details: bool = True) -> Table:
    """The worst row of everything that was compared, and what was not.

    Without `details` only the error that decides.
    """
    measures = ("max_abs", "mean_abs", "p99_abs", "max_rel", "mean_rel", "p99_rel", "cosine")
    shown = measures if details else ()
    headings = [name.replace("_", " ") for name in shown]
    table = Table(
        "rung", "subject", "worst output", *headings, "error", "tolerance", "verdict", "of"
    )
    for row, count in worst(rows):
        figures = [_figure(row.stats, name) for name in shown]
        error = f"{row.error:.1f} dB" if row.unit == "PSNR dB" else f"{row.error:.1e}"
        table.add_row(
            row.rung, row.subject, row.output, *figures, error, f"{row.tolerance:.0e}",
            verdict(row), str(count),
        )  # fmt: skip
    for item in skipped:
        blanks = ["-"] * (3 + len(shown))
        table.add_row(item.rung, item.subject, *blanks, "[yellow]skipped", "")
    return table


def _figure(stats: ErrorStats | None, name: str) -> str:
    if stats is None:
        return "-"
    return format(getattr(stats, name), ".6f" if name == "cosine" else ".1e")


def verdict(row: Row) -> str:
    """Coloured verdict; a row that is not about the bundle itself cannot fail it."""
    if row.passed:
        return "[green]pass"
    return "[bold red]FAIL" if row.gate else "[yellow]would fail"


@click.command("parity")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--rung", "rungs", multiple=True, type=click.Choice(list(RUNGS)), help="Only these rungs."
)
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(COMPARED),
    help="Only these backends.  [default: all that run here]",
)  # fmt: skip
@click.option("--images", default=2, show_default=True, type=click.IntRange(1))
@click.option(
    "--num-iter",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    help="Autoregressive steps of recorded runs and whole images.",
)
@click.option("--head-steps", type=click.IntRange(2), help="Denoising steps.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    type=click.Choice(["cpu", "cuda"]),
    help="Where PyTorch, the reference, runs.",
)
@click.option(
    "--seeds", default=2, show_default=True, type=click.IntRange(1), help="Random inputs per size."
)
@click.option(
    "--budget", default=20.0, show_default=True, help="Largest random call, in 1e9 operations."
)
@click.option("--bisect", "with_bisect", is_flag=True, help="Name the worst nodes of each graph.")
@click.option(
    "--polygraphy",
    is_flag=True,
    help="Instead: ONNX Runtime against TensorRT tensor by tensor, --backend says which.",
)
@click.option("--json", "as_json", is_flag=True, help="Print every row as JSON.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON to this file.")
def command(
    bundle: Path | None, rungs: tuple[str, ...], backends: tuple[str, ...], images: int,
    num_iter: int, head_steps: int | None, device: str, seeds: int, budget: float,
    with_bisect: bool, polygraphy: bool, as_json: bool, out: Path | None,
) -> None:  # fmt: skip
    """Compare every network of BUNDLE with PyTorch; exit code 1 if one differs too much."""
    from cspd.runtime.cli import shipped_bundle

    if out is not None:
        check_writable(out)
    opened = open_bundle(bundle or shipped_bundle())
    if polygraphy:
        _polygraphy(opened, backends or ("tensorrt",), as_json, out)
        return
    ladder = make_ladder(
        opened, backends=backends, images=images,
        num_iter=num_iter, head_steps=head_steps, seeds=seeds, budget=budget, device=device,
    )  # fmt: skip
    rows, skipped = climb(ladder, rungs or RUNGS)
    suspects = bisect(ladder, rows) if with_bisect else []
    record = to_json(ladder, rows, skipped, suspects)
    record |= {"command": command_line(), "commit": commit()}
    text = json.dumps(record, indent=1)
    if out is not None:
        out.write_text(text + "\n")
    if as_json:
        click.echo(text)
    else:
        _show(rows, skipped, suspects)
    if failures(rows):
        raise SystemExit(1)


def _polygraphy(bundle: Bundle, backends: tuple[str, ...], as_json: bool, out: Path | None) -> None:
    """Compare every graph on each of `backends`; exit code 1 if a tensor leaves its tolerance."""
    found = [
        (backend, comparison)
        for backend in backends
        for comparison in compare_graphs(bundle, bundle.manifest.graphs(), backend)
    ]
    record = {
        "schema": SCHEMA, "kind": "polygraphy", "tool": tool_version(),
        "bundle": {"sha256": bundle.sha256, "synthetic": bundle.manifest.synthetic},
        "host": environment(),
        "graphs": finite([{"backend": backend, **asdict(item)} for backend, item in found]),
    }  # fmt: skip
    text = json.dumps(record, indent=1)
    if out is not None:
        out.write_text(text + "\n")
    for backend, comparison in found:
        click.echo(f"{backend} {comparison.text}", err=as_json)
    if as_json:
        click.echo(text)
    if any(comparison.first for _, comparison in found):
        raise SystemExit(1)


def _show(rows: list[Row], skipped: list[Skipped], suspects: list[Suspect]) -> None:
    console, fits = open_console(ladder_table(rows, skipped))
    console.print(ladder_table(rows, skipped, details=fits))
    for item in skipped:
        console.print(f"skipped {item.rung} {item.subject}: {item.reason}", highlight=False)
    for row, _ in worst(failures(rows)):
        console.print(
            f"FAIL {row.rung}: {row.subject} {row.output} at {row.case}: "
            f"{row.error:.2e} {row.unit}, allowed {row.tolerance:.0e}", highlight=False,
        )  # fmt: skip
    for suspect in suspects:
        console.print(f"{suspect.graph}: {suspect.text}", highlight=False)


if __name__ == "__main__":
    command()
