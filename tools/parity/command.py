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
from rich.console import Console

from cspd.engines.atomic import check_writable
from cspd.engines.backends import BACKENDS
from cspd.engines.bundle import Bundle
from cspd.engines.console.commands import (
    OUTPUT,
    SPEED,
    WHAT,
    Choice,
    Verb,
    finish,
    json_option,
    option,
)
from cspd.engines.console.idle_options import other_options, refuse_idle
from cspd.engines.console.table import Table
from cspd.engines.console.terminal import fits, print_table
from cspd.engines.words import shell
from cspd.runtime.config import make_config
from cspd.runtime.store.outputs import environment, tool_version
from cspd.tools.parity.bisect import Suspect, bisect
from cspd.tools.parity.ladder import EVERY_RUNG, Ladder, candidates
from cspd.tools.parity.measure import ErrorStats, Row, Skipped, finite, worst
from cspd.tools.parity.rungs import RUNGS
from cspd.tools.parity.with_polygraphy import compare_graphs
from cspd.tools.provenance import command_line, commit

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
    values: dict[str, Any] = {**manifest.defaults, "num_images": images, "batch_size": images}
    values["num_iter"] = min(num_iter, manifest.geometry.num_tokens)
    values |= {"head_steps": head_steps} if head_steps else {}
    labels = tuple(range(manifest.geometry.num_classes))
    config = make_config(**values, labels=labels)
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
    columns = ("rung: subject, worst output", *headings, "error", "tolerance", "verdict", "of")
    lines = []
    for row, count in worst(rows):
        figures = [_figure(row.stats, name) for name in shown]
        error = f"{row.error:.1f} dB" if row.unit == "PSNR dB" else f"{row.error:.1e}"
        lines.append([
            f"{row.rung}: {row.subject}, {row.output}", *figures, error, f"{row.tolerance:.0e}",
            verdict(row), str(count),
        ])  # fmt: skip
    for item in skipped:
        blanks = ["-"] * (2 + len(shown))
        lines.append([f"{item.rung}: {item.subject}", *blanks, "[yellow]skipped", ""])
    return Table("Against PyTorch", columns, lines)


def _figure(stats: ErrorStats | None, name: str) -> str:
    if stats is None:
        return "-"
    return format(getattr(stats, name), ".6f" if name == "cosine" else ".1e")


def verdict(row: Row) -> str:
    """Coloured verdict; a row that is not about the bundle itself cannot fail it."""
    if row.passed:
        return "[green]pass"
    return "[bold red]FAIL" if row.gate else "[yellow]would fail"


# Options that only some rungs use, and those rungs.
USERS = {
    ("seeds", "budget"): ("backends", "graphs"),
    ("backends",): ("trajectory", "image", "decisions", "backends"),
}


@click.command(
    "parity", cls=Verb,
    example="cspd-export parity --out parity.json\n"
    "cspd-export parity bundles/mar-h-b --rung graphs --bisect",
)  # fmt: skip
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@option(
    "--rung",
    "rungs",
    multiple=True,
    type=Choice(list(RUNGS)),
    group=WHAT,
    show_default="all",
    help="Only these rungs; may be repeated.",
)
@option(
    "--backend",
    "backends",
    multiple=True,
    type=Choice(COMPARED),
    group=WHAT,
    show_default="all that run here",
    help="Only these backends; may be repeated.",
)
@option(
    "--images",
    default=2,
    type=click.IntRange(1),
    group=WHAT,
    help="Images of recorded runs and whole images.",
)
@option(
    "--num-iter",
    default=8,
    type=click.IntRange(1),
    group=WHAT,
    help="Autoregressive steps of recorded runs and whole images.",
)
@option(
    "--head-steps",
    type=click.IntRange(2),
    group=WHAT,
    show_default="the bundle's",
    help="Denoising steps.",
)
@option("--seeds", default=2, type=click.IntRange(1), group=WHAT, help="Random inputs per size.")
@option(
    "--budget",
    default=20.0,
    type=click.FloatRange(0, min_open=True),
    group=WHAT,
    help="Largest random call, in 1e9 operations.",
)
@option(
    "--bisect", "with_bisect", is_flag=True, group=WHAT, help="Name the worst nodes of each graph."
)
@option(
    "--polygraphy",
    is_flag=True,
    group=WHAT,
    help="Instead: ONNX Runtime against TensorRT tensor by tensor, --backend says which.",
)
@option(
    "--device",
    default="cpu",
    type=Choice(["cpu", "cuda"]),
    group=SPEED,
    help="Where PyTorch, the reference, runs.",
)
@option(
    "--out",
    type=click.Path(path_type=Path),
    group=OUTPUT,
    show_default="none",
    help="Also write the JSON to this file.",
)
@json_option
def command(
    bundle: Path | None, rungs: tuple[str, ...], backends: tuple[str, ...], images: int,
    num_iter: int, head_steps: int | None, device: str, seeds: int, budget: float,
    with_bisect: bool, polygraphy: bool, as_json: bool, out: Path | None,
) -> None:  # fmt: skip
    """Compare every network of BUNDLE with PyTorch; exit code 1 if one differs too much."""
    from cspd.runtime.settings import shipped_bundle, usable_bundle

    if polygraphy:
        kept = ("bundle", "backends", "polygraphy", "as_json", "out")
        refuse_idle(other_options(*kept), "not used with --polygraphy; leave it out")
    for names, users in USERS.items():
        if rungs and not set(rungs) & set(users):
            refuse_idle(names, f"not used by these rungs; leave it out, or add --rung {users[-1]}")
    if out is not None:
        check_writable(out)
    opened = usable_bundle(bundle or shipped_bundle())
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
    _write(record, out)
    if not as_json:
        _show(rows, skipped, suspects)
    finish(
        as_json, record, [out] if out else [], ending(rows, skipped),
        next_step(opened, out, bool(failures(rows)), with_bisect),
    )  # fmt: skip
    if failures(rows):
        raise SystemExit(1)


def _write(record: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")


def ending(rows: list[Row], skipped: list[Skipped]) -> str:
    """The verdict in a line: "PASS 15 of 15, 3 backends skipped: no CUDA device"."""
    judged = [row for row, _ in worst(row for row in rows if row.gate)]
    passed = sum(row.passed for row in judged)
    line = f"{'PASS' if passed == len(judged) else 'FAIL'} {passed} of {len(judged)}"
    for what, found in (
        ("backend", [item for item in skipped if item.rung == EVERY_RUNG]),
        ("comparison", [item for item in skipped if item.rung != EVERY_RUNG]),
    ):
        if found:
            reasons = "; ".join(dict.fromkeys(item.reason for item in found))
            line += f", {len(found)} {what}{'s' * (len(found) > 1)} skipped: {reasons}"
    return line


def next_step(bundle: Bundle, out: Path | None, failed: bool, bisected: bool) -> str:
    """What to do after the ladder: find the nodes of a failure, show or use a success."""
    name = shell(bundle.folder)
    if failed and not bisected:
        return f"next: cspd-export parity {name} --bisect, which names the worst nodes"
    if failed:
        return f"next: rebuild {name}, its graphs do not compute what PyTorch computes"
    if out is not None:
        return f"next: cspd-run report {shell(out)}"
    return f"next: cspd-run generate {name}"


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
    _write(record, out)
    for backend, comparison in found:
        click.echo(f"{backend} {comparison.text}", err=as_json)
    failed = sum(bool(comparison.first) for _, comparison in found)
    finish(
        as_json, record, [out] if out else [],
        f"{'FAIL' if failed else 'PASS'} {len(found) - failed} of {len(found)} graphs",
    )  # fmt: skip
    if failed:
        raise SystemExit(1)


def _show(rows: list[Row], skipped: list[Skipped], suspects: list[Suspect]) -> None:
    console, table = Console(), ladder_table(rows, skipped)
    print_table(table if fits(table) else ladder_table(rows, skipped, details=False))
    for row, _ in worst(failures(rows)):
        console.print(
            f"FAIL {row.rung}: {row.subject} {row.output} at {row.case}: "
            f"{row.error:.2e} {row.unit}, allowed {row.tolerance:.0e}", highlight=False,
        )  # fmt: skip
    for suspect in suspects:
        console.print(f"{suspect.graph}: {suspect.text}", highlight=False)


if __name__ == "__main__":
    command()
