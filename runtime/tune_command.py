"""`cspd-run tune`: measure once what head calls cost here, for `--method auto`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cspd.engines.backends import BACKENDS
from cspd.engines.bundle import open_bundle
from cspd.runtime.config import RunConfig
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.tuning import HeadCosts, tuned


def tune(pipeline: Pipeline, config: RunConfig) -> list[HeadCosts]:
    """Measure the heads of all models of the bundle anew, and save what was found."""
    return [
        tuned(pipeline, role, config, again=True)
        for role in sorted(pipeline.bundle.manifest.models)
    ]


def cost_table(found: HeadCosts) -> Table:
    """A line per number of tokens: plain stepping, and the best that speculation promises."""
    guided = "with guidance" if found.guided else "without guidance"
    table = Table(
        "tokens together", "plain stepping, ms", "choice", "expected, ms",
        title=f"{found.role} head, {found.costs.num_steps} steps, {guided}", title_justify="left",
    )  # fmt: skip
    chooser = found.chooser()
    for tokens, plain in found.costs.plain:
        best = chooser.choose(int(tokens))
        way = "plain" if best.depth is None else f"up to {int(best.depth.max())} rows a token"
        table.add_row(f"{tokens:g}", f"{plain:.2f}", way, f"{best.expected_ms:.2f}")
    return table


@click.command("tune")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--backend", default="onnxruntime", show_default=True, type=click.Choice(list(BACKENDS))
)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--threads", default=0, type=click.IntRange(min=0), show_default="all cores")
@click.option("--head-steps", help="Denoising steps.  [default: the bundle's]")
@click.option("--cfg", type=float, help="Guidance scale; 1 is none.  [default: the bundle's]")
@click.option("--json", "as_json", is_flag=True, help="Print the records instead of tables.")
def command(
    bundle: Path | None, backend: str, device: str, threads: int, as_json: bool, **sampling: Any
) -> None:
    """Measure what head calls of BUNDLE cost on this machine, by default of the shipped pair.

    Costs are kept beside the bundle, or in the user's cache folder where that is not possible, and
    hold for this bundle, backend, machine and these versions only.
    """
    from cspd.runtime.cli import configure, shipped_bundle

    opened = open_bundle(bundle or shipped_bundle())
    config = configure(opened, None, {**sampling, "backend": backend})
    found = tune(Pipeline(opened, backend, device, threads), config)
    if as_json:
        click.echo(json.dumps([record.model_dump(mode="json") for record in found], indent=1))
        return
    for record in found:
        Console().print(cost_table(record))
