"""`cspd-export inspect`: what a bundle holds, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cspd.engines.console.commands import OUTPUT, Verb, human_bytes, option
from cspd.engines.errors import printable
from cspd.engines.manifest import Manifest
from cspd.export.bundle_words import contents, engines_of, next_step
from cspd.runtime.settings import usable_bundle


@click.command(
    "inspect", cls=Verb, example="cspd-export inspect bundles/mar-h-b",
    context_settings={"show_default": True},
)  # fmt: skip
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--no-verify", is_flag=True, help="Do not read the files.")
@option("--json", "as_json", is_flag=True, group=OUTPUT, help="Print the manifest.")
def command(bundle: Path, as_json: bool, no_verify: bool) -> None:
    """Show what BUNDLE holds, check hashes, weights and defaults; loads no engine."""
    opened = usable_bundle(bundle)
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
    hashes = "files not checked" if no_verify else "all hashes match, all weights are finite"
    engines = engines_of(opened.manifest)
    click.echo(f"{contents(opened.manifest)}, {hashes}; engines: {engines}")
    click.echo(next_step(opened))


def summary(manifest: Manifest, sha256: str) -> list[str]:
    """What a bundle is, in a few lines."""
    geometry, schedule = manifest.geometry, manifest.schedule
    lines = [
        f"bundle {sha256[:16]}, made by cspd {manifest.tool_version}, opset {manifest.opset}",
        f"{geometry.num_tokens} tokens of {geometry.token_dim} channels, "
        f"images {geometry.image_channels} x {geometry.image_size} x {geometry.image_size}, "
        f"{geometry.num_classes} classes; {schedule.words}",
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
    table = Table("graph", "ONNX", "error vs\nPyTorch", "engines", box=box.SIMPLE)
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
