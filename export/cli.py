"""`cspd-export`: turn checkpoints into a bundle, and look into one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cspd.engines.bundle import check_target, open_bundle
from cspd.engines.commands import Commands, human_bytes
from cspd.engines.errors import MissingExtraError, printable
from cspd.engines.lint import lint_model
from cspd.engines.manifest import Manifest, Precision, Role
from cspd.engines.trt_options import BuildOptions as EngineOptions
from cspd.engines.trt_progress import ProgressCallback, rich_progress

PRESETS = ("mar-b", "mar-l", "mar-h")
FILE = click.Path(path_type=Path, dir_okay=True)
TABLE_WIDTH = 120


@click.group(cls=Commands)
@click.version_option(package_name="cspd")
def main() -> None:
    """Export pairs of autoregressive image models to ONNX and TensorRT."""


assert isinstance(main, Commands)
main.add_tool("parity", "cspd.tools.parity", "Compare every graph of BUNDLE with PyTorch.")
main.add_tool("triton", "cspd.tools.triton", "Write BUNDLE as a Triton model repository.")


def require_exporter() -> None:
    """Raise MissingExtraError unless what an export needs is installed."""
    for library, extra in (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "cpu")):
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(library, extra)


@main.command()
@click.option(
    "--target", required=True, type=click.Choice(PRESETS), help="Size of the target model."
)
@click.option("--draft", type=click.Choice(PRESETS), help="Size of the draft model.")
@click.option("--target-weights", type=FILE, help="Weights of the target: a file or a folder.")
@click.option("--draft-weights", type=FILE, help="Weights of the draft: a file or a folder.")
@click.option("--vae", type=FILE, help="Weights of the KL-16 decoder: a file or a folder.")
@click.option(
    "--random-weights", is_flag=True, help="No checkpoints: random weights, marked synthetic."
)
@click.option("--allow-non-ema", is_flag=True, help="Accept weights without moving average.")
@click.option(
    "--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "fp16", "bf16"])
)
@click.option(
    "--max-batch", default=16, show_default=True, help="Largest batch (guidance doubles it)."
)
@click.option("--max-rows", default=1024, show_default=True, help="Most tokens in one head call.")
@click.option(
    "--clip-timesteps",
    type=click.IntRange(min=1),
    help="Sample from this time on instead of 999; changes the law.",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    help="Also build engines; may be repeated.",
    type=click.Choice(["onnxruntime", "tensorrt", "tensorrt-rtx"]),
)
@click.option(
    "--compute-capability",
    multiple=True,
    metavar="X.Y",
    show_default="8.6, 8.9, 12.0",
    help="tensorrt-rtx: GPUs that the engines are for; may be repeated.",
)
@click.option(
    "--workspace", type=click.IntRange(min=1), metavar="MIB", help="Limit of scratch memory."
)
@click.option(
    "--opt-level", default=3, show_default=True, help="Effort of the engine builder, 0-5."
)
@click.option("--timing-cache", type=FILE, help="tensorrt: file with timings of earlier builds.")
@click.option(
    "--version-compatible", is_flag=True, help="tensorrt: engines for newer versions too."
)
@click.option("--hardware-compatible", is_flag=True, help="tensorrt: engines for Ampere and later.")
@click.option(
    "--hoisted/--no-hoisted",
    default=True,
    show_default=True,
    help="With engines: graphs that take the head's modulations from a table.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle in --out.")
def build(
    target: str, draft: str | None, target_weights: Path | None, draft_weights: Path | None,
    vae: Path | None, random_weights: bool, allow_non_ema: bool, precision: Precision,
    max_batch: int,
    max_rows: int, clip_timesteps: int | None, backends: tuple[str, ...], out: Path,
    overwrite: bool, hoisted: bool, **engine: Any,
) -> None:  # fmt: skip
    """Export a pair of MAR models and its decoder as one verified bundle."""
    require_exporter()
    from cspd.export.build import BuildOptions, build_bundle
    from cspd.export.build_table import cost_table
    from cspd.export.pairs import mar_plan

    engines = engine_options(backends, engine)
    check_target(out, overwrite)
    presets: dict[Role, str] = {"target": target}
    if draft:
        presets["draft"] = draft
    plan = mar_plan(
        presets, {"target": target_weights, "draft": draft_weights}, vae,
        BuildOptions(max_batch, max_rows, precision, engines=engines, hoisted=hoisted),
        random_weights=random_weights,
        allow_non_ema=allow_non_ema, clip_timesteps=clip_timesteps, warn=note,
    )  # fmt: skip
    # In a log, the width of a terminal would cut the names of the graphs.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else TABLE_WIDTH)
    build_bundle(
        plan, out, overwrite, report=note, show=progress_bar,
        summary=lambda finished: console.print(cost_table(finished)),
    )  # fmt: skip
    click.echo(click.format_filename(out))


def engine_options(backends: tuple[str, ...], options: dict[str, Any]) -> tuple[EngineOptions, ...]:
    """One set of options per TensorRT flavour among `backends`."""
    workspace = options["workspace"]
    return tuple(
        EngineOptions(
            flavour=flavour,
            compute_capabilities=options["compute_capability"],
            workspace_bytes=workspace << 20 if workspace else None,
            optimization_level=options["opt_level"],
            version_compatible=options["version_compatible"],
            hardware_compatible=options["hardware_compatible"],
            timing_cache=options["timing_cache"],
        )
        for flavour in dict.fromkeys(backends)
        if flavour != "onnxruntime"
    )


def progress_bar(name: str) -> AbstractContextManager[ProgressCallback]:
    """A bar on a terminal, nothing elsewhere: the lines of the report say it all there."""
    if sys.stderr.isatty():
        return rich_progress(name)
    return contextlib.nullcontext(lambda fraction, phase: None)


@main.command("demo-pair")
@click.argument("weights", type=click.Path(path_type=Path, file_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle in --out.")
def demo_pair(weights: Path, out: Path, overwrite: bool) -> None:
    """Rebuild the shipped bundle from target.safetensors and draft.safetensors in WEIGHTS."""
    require_exporter()
    from cspd.export.build import build_bundle
    from cspd.export.pairs import demo_plan

    build_bundle(demo_plan(weights), out, overwrite, report=note)
    click.echo(click.format_filename(out))


@main.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--flavour", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="Ask its parser.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def lint(model: Path, flavour: str | None, as_json: bool) -> None:
    """Say what would make the ONNX file MODEL fail or crawl as an engine."""
    findings = lint_model(model, None, flavour)
    if as_json:
        click.echo(json.dumps([finding.model_dump() for finding in findings], indent=1))
    else:
        for finding in findings:
            click.echo(f"{finding.severity}: {finding.rule}: {finding.message}")
        click.echo(f"{len(findings)} findings", err=True)
    if any(finding.severity == "error" for finding in findings):
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@click.option("--no-verify", is_flag=True, help="Do not hash the files.")
def inspect(bundle: Path, as_json: bool, no_verify: bool) -> None:
    """Show what BUNDLE holds, and check every file against its hash; loads no engine."""
    opened = open_bundle(bundle)
    if not no_verify:
        for name in opened.manifest.files:
            opened.file(name)
    if as_json:
        click.echo(json.dumps(opened.manifest.model_dump(mode="json"), indent=1))
        return
    console = Console()
    for line in summary(opened.manifest, opened.sha256):
        console.print(printable(line), highlight=False, markup=False)
    console.print(graph_table(opened.manifest))


def summary(manifest: Manifest, sha256: str) -> list[str]:
    """What a bundle is, in a few lines."""
    geometry, schedule = manifest.geometry, manifest.schedule
    clip = f", clipped at {schedule.clip_timesteps}" if schedule.clip_timesteps else ""
    lines = [
        f"bundle {sha256[:16]}, made by cspd {manifest.tool_version}, opset {manifest.opset}",
        f"{geometry.num_tokens} tokens of {geometry.token_dim} channels, "
        f"images {geometry.image_channels} x {geometry.image_size} x {geometry.image_size}, "
        f"{geometry.num_classes} classes; {schedule.kind} schedule{clip}",
    ]
    lines += [
        f"{role}: {model.preset}, {model.precision}, weights from {model.source}"
        + (f" of {model.source_sha256[:16]}" if model.source_sha256 else "")
        for role, model in manifest.models.items()
    ]
    for role, model in manifest.models.items():
        if effect := model.image_effect:
            lines.append(
                f"{role} in {model.precision}, whole image: tokens differ from fp32 by "
                f"{effect.tokens_error:.1e}, pixels {effect.psnr:.1f} dB "
                f"({effect.num_iter} x {effect.head_steps} steps, {effect.measured_by})"
            )
    if manifest.synthetic:
        lines.append("SYNTHETIC: random weights; images and acceptance rates mean nothing")
    return lines


def graph_table(manifest: Manifest) -> Table:
    """A row per graph: file size, weights, error against PyTorch, engines."""
    table = Table("graph", "ONNX", "error vs PyTorch", "engines")
    for label, graph in manifest.graphs().items():
        table.add_row(
            label,
            human_bytes(manifest.files[graph.file].bytes),
            f"{graph.measured_error:.1e}",
            ", ".join(graph.engines) or "-",
        )
    for name, record in manifest.files.items():
        if name.endswith(".safetensors"):
            table.add_row(escape(name), human_bytes(record.bytes), "", "")
    return table


def note(message: Any) -> None:
    """A line of progress or a warning."""
    click.echo(message, err=True)


if __name__ == "__main__":
    main()
