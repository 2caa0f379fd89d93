"""`cspd-run`: generate images from a bundle, replay one, check the machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from rich.console import Console

from cspd.engines.backends import BACKENDS
from cspd.engines.bundle import open_bundle
from cspd.engines.commands import Commands
from cspd.engines.doctor import diagnose
from cspd.runtime import run
from cspd.runtime.config import HeadMode, Method
from cspd.runtime.folder import GRID
from cspd.runtime.formats import Format, Layout
from cspd.runtime.images import write_png
from cspd.runtime.outputs import image_metadata
from cspd.runtime.replay import replay as make_again
from cspd.runtime.settings import configure, shipped_bundle
from cspd.runtime.tables import doctor_table, outcome_table

Command = TypeVar("Command", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)


@click.group(cls=Commands)
@click.version_option(package_name="cspd")
def main() -> None:
    """Continuous speculative decoding of autoregressive image models."""


assert isinstance(main, Commands)
main.add_tool("tune", "cspd.runtime.tune_command", "Measure what head calls cost here.")
main.add_tool("bench", "cspd.tools.bench", "Measure methods against each other.")
main.add_tool("evaluate", "cspd.tools.evaluate", "Score images as the papers do.")
main.add_tool("report", "cspd.tools.report", "Write one HTML file about runs.")
main.add_tool("serve", "cspd.tools.serve", "Answer requests for images over HTTP.")


def machine_options(command: Command) -> Command:
    """Options that choose what runs the networks."""
    for option in (
        click.option(
            "--threads",
            default=0,
            type=click.IntRange(0, 1024),
            show_default="all cores",
            help="CPU threads.",
        ),
        click.option(
            "--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"])
        ),
    ):
        command = option(command)
    return command


def whole(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """A number where the text is one."""
    return int(value) if value and value.isdecimal() else value


# Option names are RunConfig's fields. A default of None means: what the bundle says, and where it
# says nothing, RunConfig's own default.
SAMPLING = (
    click.option("--num-images", type=int, help="Number of images.  [default: one per label]"),
    click.option(
        "--class-balanced", is_flag=True, default=None,
        help="Labels in blocks of equal length instead of in turn.",
    ),
    click.option("--method", type=click.Choice(get_args(Method)), help="Decoding method."),
    click.option("--seed", type=int, help="Seed; image k of a seed is always the same image."),
    click.option("--num-iter", type=int, help="Autoregressive steps."),
    click.option(
        "--head-steps", callback=whole,
        help='Denoising steps: "100", or "50:20", fewer and fewer (lossy).',
    ),
    click.option("--cfg", type=float, help="Guidance scale; 1 is none."),
    click.option("--cfg-schedule", type=click.Choice(["linear", "constant"]), help="Over steps."),
    click.option("--temperature", type=float, help="Factor on the noise of every denoising step."),
    click.option("--gamma", type=int, help="cspd: tokens drafted per verification."),
    click.option("--prefill", type=float, help="cspd: share of tokens from the target."),
    click.option(
        "--accept-temperature", type=float,
        help="cspd: width of the acceptance test; 1 is the paper's formula, 42 the released code.",
    ),
    click.option(
        "--verify", type=click.Choice(["parallel", "prefix"]),
        help="cspd: judge a window at once (released code), or up to the first rejection (paper).",
    ),
    click.option("--align/--no-align", default=None, help="cspd: share the noise."),
    click.option(
        "--on-reject", type=click.Choice(["residual", "target"]),
        help="cspd: what replaces a rejected token.",
    ),
    click.option(
        "--residual-temperature", type=float,
        help="cspd --on-reject residual: width of the residual; 1 in the paper and the released "
        "code.  [default: 1]",
    ),
    click.option(
        "--count-in", type=click.Choice(["tokens", "steps"]),
        help="cspd: what --gamma and --prefill count; steps in the released code.",
    ),
    click.option(
        "--as-released", is_flag=True, default=None,
        help="cspd as the authors released it: test at 42, residual at 1, count in steps.",
    ),
    click.option(
        "--head", type=click.Choice(get_args(HeadMode)),
        help="Denoising: step by step, speculatively, or what is faster.  [default: by method]",
    ),
    click.option(
        "--window", type=int,
        help="lossless: denoising steps verified per call.  [default: by measured costs, 1 is "
        "stepping]",
    ),
    click.option(
        "--relax", help='lossless, loosened: "tv=0.05" or "sigma=0.5" (approximate).'
    ),
    click.option("--batch-size", type=int, help="Images computed together."),
    click.option(
        "--modulation-memory", type=int,
        help="MiB for what the head computes ahead of its steps; loops are cut to it, and engines "
        "compute it ahead if it fits and tune did not find that dearer.  "
        "[default: 512]",
    ),
    click.option(
        "--reproducible/--no-reproducible", default=None,
        help="Pad batches so that an image never depends on its batch.  [default: on]",
    ),
    click.option("--backend", type=click.Choice(list(BACKENDS)), help="What runs the networks."),
)  # fmt: skip


def sampling_options(command: Command) -> Command:
    """Options that decide which images are made."""
    for option in reversed(SAMPLING):
        command = option(command)
    return command


@main.command()
@click.argument("bundle", type=FOLDER, required=False)
@click.option(
    "--labels", multiple=True,
    help='Classes, cycled: "207,360", "0-3" or "sneaker,bag"; given twice, both.  [default: all]',
)  # fmt: skip
@sampling_options
@machine_options
@click.option(
    "--baseline", is_flag=True, help="Also run the target alone and print the speed ratio."
)
@click.option("--out", type=FOLDER, default=Path("out"), show_default=True, help="Folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in --out.")
@click.option(
    "--format",
    "format_name",
    default="png",
    show_default=True,
    type=click.Choice(get_args(Format)),
    help="Loose PNGs, shards, or ADM's npz.",
)
@click.option(
    "--shard-size",
    default=1000,
    show_default=True,
    type=click.IntRange(min=1),
    help="webdataset, parquet: images per file.",
)
@click.option(
    "--ray",
    "address",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Compute on Ray: at ADDRESS, or on this machine alone.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="With --ray: number of workers.  [default: one per GPU, or per 4 CPUs]",
)
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print run.json instead of a table.")
def generate(
    bundle: Path | None, labels: tuple[str, ...], device: str, threads: int, baseline: bool,
    out: Path,
    overwrite: bool, format_name: Format, shard_size: int, address: str | None,
    workers: int | None, quiet: bool, as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Generate images with BUNDLE, by default the small trained pair inside the package.

    A run that was stopped, killed or ran out of disk is resumed by the same command.
    """
    opened = open_bundle(bundle or shipped_bundle())
    config = configure(opened, ",".join(labels) if labels else None, sampling)
    if workers is not None and address is None:
        raise click.UsageError("--workers needs --ray")
    if baseline and address is not None:
        raise click.UsageError("--baseline compares times in one process: leave --ray out")
    job = run.Job(
        run.Machine(device, threads), Layout(format=format_name, shard_size=shard_size),
        None if address is None else run.Cluster(address, workers), overwrite, baseline, quiet,
    )  # fmt: skip
    record, outcomes = run.generate(opened, config, out, job)
    for line in record.get("notes", []):
        click.echo(f"note: {line}", err=True)
    if as_json:
        click.echo(json.dumps(record, indent=1))
    else:
        Console().print(outcome_table(outcomes, opened))
        click.echo(click.format_filename(out / GRID))


@main.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("bundle", type=FOLDER, required=False)
@machine_options
@click.option("--out", type=FOLDER, help="Also write the image that was made.")
def replay(image: Path, bundle: Path | None, device: str, threads: int, out: Path | None) -> None:
    """Make IMAGE again from the settings inside it, and say whether it came out the same."""
    opened = open_bundle(bundle or shipped_bundle())
    made, config, same = make_again(opened, image, device=device, threads=threads)
    if out is not None:
        write_png(out, made.pixels, image_metadata(config, opened, made))
    if not same:
        raise click.ClickException(
            f"{image}: the pixels differ; same bundle and settings, another machine or library"
        )
    click.echo(f"{image}: identical")


@main.command()
@click.option(
    "--backend",
    default="onnxruntime",
    show_default=True,
    type=click.Choice(list(BACKENDS)),
    help="Backend that decides the exit code.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(backend: str, as_json: bool) -> None:  # fmt: skip
    """Say what this machine can build and run, and how to mend what it cannot."""
    diagnosis = diagnose()
    if as_json:
        click.echo(json.dumps(diagnosis.model_dump(mode="json"), indent=1))
    else:
        Console().print(doctor_table(diagnosis))
    if not diagnosis.runs(backend):
        raise click.ClickException(f"{backend} cannot run here")


if __name__ == "__main__":
    main()
