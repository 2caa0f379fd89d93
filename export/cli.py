"""`cspd-export`: turn checkpoints into a bundle, and look into one."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from rich.console import Console

from cspd.engines.backends import ENGINES
from cspd.engines.console.commands import (
    OUTPUT,
    WHAT,
    Choice,
    Commands,
    finish,
    json_option,
    option,
)
from cspd.engines.console.idle_options import refuse_idle
from cspd.engines.errors import CspdError, MissingExtraError
from cspd.engines.lint import lint_model
from cspd.engines.manifest import Precision, Role
from cspd.engines.schedule import ScheduleSpec
from cspd.engines.trt.progress import ProgressCallback, rich_progress
from cspd.export.engine_options import engine_options, with_engine_options
from cspd.export.mar.presets import HEAD_STEPS, PUBLISHED

if TYPE_CHECKING:
    from cspd.export.build import BundlePlan
    from cspd.export.estimates import Estimate

FILE = click.Path(path_type=Path, dir_okay=True)
TABLE_WIDTH = 120
# Where sampling begins at the latest; at the earliest, each default step still has a time.
LAST_TIMESTEP = ScheduleSpec().last_timestep


@click.group(cls=Commands)
@click.version_option(package_name="cspd")
def main() -> None:
    """Export pairs of autoregressive image models to ONNX and TensorRT."""


assert isinstance(main, Commands)
main.add_tool("inspect", "cspd.tools.inspect_bundle", "Show what BUNDLE holds, and check it.")
main.add_tool("parity", "cspd.tools.parity.command", "Compare every graph of BUNDLE with PyTorch.")
main.add_tool(
    "triton", "cspd.runtime.triton.repository", "Write BUNDLE as a Triton model repository."
)


def require_exporter() -> None:
    """Raise MissingExtraError unless what an export needs is installed."""
    for library, extra in (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "cpu")):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, extra)


precision_option = option(
    "--precision", default="fp32", type=Choice(get_args(Precision)), group=WHAT,
    help="Number format of the networks; where it matters, fp32 stays.",
)  # fmt: skip
out_option = option(
    "--out", required=True, type=click.Path(path_type=Path), group=OUTPUT,
    help="Folder of the bundle.",
)  # fmt: skip
overwrite_option = option(
    "--overwrite", is_flag=True, group=OUTPUT, help="Replace the bundle in --out."
)


@main.command(
    example="cspd-export build --target mar-h --draft mar-b --out bundles/mar-h-b\n"
    "cspd-export build --target mar-h --draft mar-b --random-weights --dry-run --out b"
)
@option("--target", required=True, type=Choice(PUBLISHED), group=WHAT, help="Size of the target.")
@option(
    "--draft", type=Choice(PUBLISHED), group=WHAT, show_default="none", help="Size of the draft."
)
@option(
    "--target-weights", type=FILE, group=WHAT, show_default="below pretrained_models",
    help="Weights of the target: a file or a folder.",
)  # fmt: skip
@option(
    "--draft-weights", type=FILE, group=WHAT, show_default="below pretrained_models",
    help="Weights of the draft: a file or a folder.",
)  # fmt: skip
@option(
    "--vae", type=FILE, group=WHAT, show_default="below pretrained_models",
    help="Weights of the KL-16 decoder: a file or a folder.",
)  # fmt: skip
@option(
    "--random-weights", is_flag=True, group=WHAT,
    help="No checkpoints: random weights, marked synthetic.",
)  # fmt: skip
@option("--allow-non-ema", is_flag=True, group=WHAT, help="Accept weights without moving average.")
@precision_option
@option(
    "--max-batch", default=16, type=click.IntRange(1, 4096), group=WHAT,
    help="Largest batch (guidance doubles it).",
)  # fmt: skip
@option(
    "--max-rows", default=1024, type=click.IntRange(1, 1 << 20), group=WHAT,
    help="Most tokens in one head call.",
)  # fmt: skip
@option(
    "--clip-timesteps", type=click.IntRange(HEAD_STEPS - 1, LAST_TIMESTEP), group=WHAT,
    show_default=str(LAST_TIMESTEP),
    help="Sample from this time on; changes the output distribution.",
)  # fmt: skip
@with_engine_options
@out_option
@overwrite_option
@option(
    "--dry-run", is_flag=True, group=OUTPUT,
    help="Show the graphs, estimated time, memory and disk, and what is missing; make nothing.",
)  # fmt: skip
@json_option
def build(
    target: str, draft: str | None, target_weights: Path | None, draft_weights: Path | None,
    vae: Path | None, random_weights: bool, allow_non_ema: bool, precision: Precision,
    max_batch: int, max_rows: int, clip_timesteps: int | None, backends: tuple[str, ...],
    hoisted: bool, out: Path, overwrite: bool, dry_run: bool, as_json: bool, **engine: Any,
) -> None:  # fmt: skip
    """Export MAR models and a decoder as one verified bundle."""
    engines = engine_options(backends, engine)
    if random_weights:
        weights = ("target_weights", "draft_weights", "allow_non_ema")
        refuse_idle(weights, "not used with --random-weights; leave one of the two out")
    if draft is None:
        refuse_idle(["draft_weights"], "there is no draft; add --draft with its size")
    require_exporter()
    from cspd.engines.console.preflight import problems
    from cspd.export.build import BuildOptions
    from cspd.export.estimates import estimate
    from cspd.export.pairs import mar_plan
    from cspd.export.preflight import place_checks, size_checks, weight_checks

    presets: dict[Role, str] = {"target": target, **({"draft": draft} if draft else {})}
    files: dict[Role, Path | None] = {"target": target_weights, "draft": draft_weights}
    options = BuildOptions(max_batch, max_rows, precision, engines=engines, hoisted=hoisted)
    expected = estimate(presets, options)
    found = problems([
        *place_checks(out, overwrite, engines),
        *weight_checks(presets, files, vae, random_weights), *size_checks(expected, out),
    ])  # fmt: skip
    if dry_run:
        show_plan(expected, as_json, found)
    refuse(found)
    if not dry_run:
        plan = mar_plan(
            presets, files, vae, options, random_weights=random_weights,
            allow_non_ema=allow_non_ema, clip_timesteps=clip_timesteps, warn=note,
        )  # fmt: skip
        note(expected.summary())
        make(plan, out, overwrite, as_json)


def show_plan(expected: Estimate, as_json: bool, found: list[str]) -> None:
    """What a build would make and take, and whether it could begin."""
    from cspd.export.build_table import plan_table

    record = {"schema": 1, "kind": "build plan", "problems": found, **expected.to_json()}
    if not as_json:
        Console().print(plan_table(expected))
    ready = [] if found else ["nothing is missing; next: the same command without --dry-run"]
    finish(as_json, record, [], expected.summary(), *ready)


def make(plan: BundlePlan, out: Path, overwrite: bool, as_json: bool) -> None:
    """Build the bundle of `plan`, and say where it is, what it holds and what to do next."""
    from cspd.engines.bundle import MANIFEST, open_bundle
    from cspd.export.build import build_bundle
    from cspd.export.build_table import cost_table
    from cspd.export.bundle_words import contents, engines_of, next_step

    # In a log, the width of a terminal would cut the names of the graphs.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else TABLE_WIDTH)
    start = time.monotonic()
    build_bundle(
        plan, out, overwrite, report=note, show=progress_bar,
        summary=lambda finished: console.print(cost_table(finished)),
    )  # fmt: skip
    bundle = open_bundle(out)
    files = {MANIFEST: (out / MANIFEST).stat().st_size} | {
        name: record.bytes for name, record in bundle.manifest.files.items()
    }
    record = {
        "schema": 1, "kind": "build", "bundle": click.format_filename(out),
        "sha256": bundle.sha256, "bytes": sum(files.values()),
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip
    finish(
        as_json, record, [out / name for name in files],
        f"{click.format_filename(out)}: {contents(bundle.manifest)}; "
        f"engines: {engines_of(bundle.manifest)}",
        next_step(bundle),
    )  # fmt: skip


def refuse(found: list[str]) -> None:
    """Raise CspdError if there is a problem; each gets a line of its own."""
    for problem in found[:-1]:
        note(f"Error: {problem}")
    if found:
        raise CspdError(found[-1])


def progress_bar(name: str) -> AbstractContextManager[ProgressCallback]:
    """A bar on a terminal, nothing elsewhere: the lines of the report say it all there."""
    if sys.stderr.isatty():
        return rich_progress(name)
    return contextlib.nullcontext(lambda fraction, phase: None)


@main.command(
    "demo-pair", example="cspd-export demo-pair --backend tensorrt-rtx --out bundles/demo-rtx"
)
@click.argument("weights", required=False, type=click.Path(path_type=Path, file_okay=False))
@precision_option
@with_engine_options
@out_option
@overwrite_option
@json_option
def demo_pair(
    weights: Path | None, precision: Precision, backends: tuple[str, ...], hoisted: bool,
    out: Path, overwrite: bool, as_json: bool, **engine: Any,
) -> None:  # fmt: skip
    """Rebuild the shipped bundle, with engines if you like.

    WEIGHTS is a folder with target.safetensors and draft.safetensors, by default the weights of
    the shipped bundle.
    """
    engines = engine_options(backends, engine)
    require_exporter()
    from cspd.engines.console.preflight import problems
    from cspd.export.pairs import demo_plan
    from cspd.export.preflight import place_checks

    refuse(problems(place_checks(out, overwrite, engines)))
    make(demo_plan(weights, precision, engines, hoisted), out, overwrite, as_json)


@main.command(
    example="cspd-export lint bundles/mar-h-b/target/backbone.onnx --flavour tensorrt-rtx"
)
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@option(
    "--flavour", type=Choice(ENGINES), show_default="neither",
    help="TensorRT whose parser is asked too.",
)  # fmt: skip
@json_option
def lint(model: Path, flavour: str | None, as_json: bool) -> None:
    """Say what would make an engine of MODEL fail, or slow."""
    findings = lint_model(model, None, flavour)
    errors = sum(finding.severity == "error" for finding in findings)
    if not as_json:
        for finding in findings:
            click.echo(f"{finding.severity}: {finding.rule}: {finding.message}")
    finish(
        as_json, {"schema": 1, "kind": "lint", "findings": [f.model_dump() for f in findings]}, [],
        f"{'FAIL' if errors else 'PASS'}: {errors} errors, {len(findings) - errors} warnings; "
        + (f"{flavour}'s parser was asked" if flavour else "next: --flavour asks a parser too"),
    )  # fmt: skip
    if errors:
        raise click.exceptions.Exit(1)


def note(message: Any) -> None:
    """A line of progress or a warning."""
    click.echo(message, err=True)


if __name__ == "__main__":
    main()
