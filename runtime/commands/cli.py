"""`cspd-run`: generate images from a bundle, replay one, check the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from cspd.engines.backends import BACKENDS
from cspd.engines.console.commands import (
    OUTPUT,
    SPEED,
    Choice,
    Commands,
    finish,
    json_option,
    option,
    out_folder,
)
from cspd.engines.console.idle_options import refuse_idle
from cspd.engines.console.terminal import print_table
from cspd.engines.doctor import diagnose
from cspd.engines.words import counted, shell
from cspd.runtime.commands import run
from cspd.runtime.commands.options import FOLDER, LABELS, machine_options, sampling_options
from cspd.runtime.commands.preflight import make_plan, require
from cspd.runtime.commands.replay import replay as make_again
from cspd.runtime.commands.tables import doctor_tables, fixes, outcome_table
from cspd.runtime.config import check_config
from cspd.runtime.settings import configure, shipped_bundle, usable_bundle
from cspd.runtime.store.formats import SHARDED, Format, Layout
from cspd.runtime.store.images import numbered, write_png
from cspd.runtime.store.outputs import image_metadata
from cspd.runtime.store.ownership import GRID


@click.group(cls=Commands)
@click.version_option(package_name="cspd")
def main() -> None:
    """Continuous speculative decoding of autoregressive image models."""


assert isinstance(main, Commands)
main.add_tool("tune", "cspd.runtime.commands.tune", "Measure what head calls cost here.")
main.add_tool("bench", "cspd.tools.bench.command", "Measure methods against each other.")
main.add_tool("evaluate", "cspd.tools.judge.evaluate", "Score images as the papers do.")
main.add_tool("report", "cspd.tools.report.command", "Write one HTML file about runs.")
main.add_tool("serve", "cspd.runtime.serve.command", "Answer requests for images over HTTP.")


@main.command(
    example="cspd-run generate --labels sneaker,bag --num-images 8 --out out/shoes\n"
    "cspd-run generate --labels 0-9 --method lossless --baseline"
)
@click.argument("bundle", type=FOLDER, required=False)
@LABELS
@sampling_options
@machine_options
@option(
    "--ray",
    "address",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    group=SPEED,
    show_default="in this process",
    help="Compute on Ray: at ADDRESS, or on this machine alone.",
)
@option(
    "--workers",
    type=click.IntRange(min=1),
    group=SPEED,
    show_default="one per GPU, or per 4 CPUs",
    help="With --ray: number of workers.",
)
@option(
    "--baseline",
    is_flag=True,
    group=SPEED,
    help="Also run the target alone and print the speed ratio.",
)
@option(
    "--out",
    type=FOLDER,
    group=OUTPUT,
    show_default="out/generate-001, counting up",
    help="Folder to write, or of the run to resume.",
)
@option("--overwrite", is_flag=True, group=OUTPUT, help="Replace an earlier run in --out.")
@option(
    "--format",
    "format_name",
    default="png",
    type=Choice(get_args(Format)),
    group=OUTPUT,
    help="Loose PNGs, shards, or ADM's npz.",
)
@option(
    "--shard-size",
    default=Layout().shard_size,
    type=click.IntRange(min=1),
    group=OUTPUT,
    help="webdataset, parquet: images per file.",
)
@option(
    "--dry-run",
    is_flag=True,
    group=OUTPUT,
    help="Say what would be done and what would stop it; make nothing.",
)
@option("--quiet", is_flag=True, group=OUTPUT, help="No progress.")
@json_option
def generate(
    bundle: Path | None, labels: tuple[str, ...], device: str, threads: int, baseline: bool,
    out: Path | None,
    overwrite: bool, format_name: Format, shard_size: int, address: str | None,
    workers: int | None, dry_run: bool, quiet: bool, as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Generate images with BUNDLE, by default the shipped pair.

    That pair is small, trained and inside the package. A run that was stopped, killed or ran out of
    disk is resumed by the same command with its --out.
    """
    opened = usable_bundle(bundle or shipped_bundle())
    config = configure(opened, ",".join(labels) if labels else None, sampling)
    if address is None:
        refuse_idle(["workers"], "changes nothing without --ray: leave it out, or add --ray")
    elif baseline:
        raise click.UsageError("--baseline compares times in one process: leave --ray out")
    if config.method == "target":
        refuse_idle(["baseline"], "changes nothing with --method target: leave it out")
    if out is None:
        refuse_idle(["overwrite"], "changes nothing without --out: every run has a new folder")
    if format_name not in SHARDED:
        why = (
            f"changes nothing with --format {format_name}: leave it out, or add --format webdataset"
        )
        refuse_idle(["shard_size"], why)
    job = run.Job(
        run.Machine(device, threads),
        Layout(format=format_name, shard_size=shard_size),
        None if address is None else run.Cluster(address, workers), overwrite, baseline, quiet,
    )  # fmt: skip
    check_config(config, opened.manifest)
    place = out or Path("out") / "generate"
    plan = make_plan(
        opened, config, place, layout=job.layout, device=device, threads=threads,
        on_ray=address is not None,
    )  # fmt: skip
    if dry_run:
        finish(as_json, plan.model_dump(mode="json"), [], *plan.lines)
    require(plan)
    if dry_run:
        return
    with out_folder(out, "generate") as folder:
        if out is None and not quiet:
            # Known before the first image, in case that nothing can be said at the end.
            click.echo(f"writing {click.format_filename(folder)}", err=True)
        record, outcomes = run.generate(opened, config, folder, job)
    for line in record.get("notes", []):
        click.echo(f"note: {line}", err=True)
    if not as_json:
        print_table(outcome_table(outcomes, opened))
    made = sorted(path for path in folder.rglob("*") if path.is_file())
    name, preview = click.format_filename(folder), click.format_filename(folder / GRID)
    lines = [f"{counted(config.num_images, 'image')} in {name}, preview: {preview}"]
    if format_name == "png":
        first = folder / numbered(0, config.num_images, "png")
        lines.append(f"again: {replay_command(first, bundle, device)}")
    finish(as_json, record, made, *lines)


def replay_command(image: Path, bundle: Path | None, device: str) -> str:
    """What makes `image` again, as it is typed."""
    words = [str(image), *([str(bundle)] if bundle else [])]
    words += ["--device", device] if device != "cpu" else []
    return shell("cspd-run", "replay", *words)


@main.command(example="cspd-run replay out/generate-001/00000.png")
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("bundle", type=FOLDER, required=False)
@machine_options
@option("--out", type=FOLDER, group=OUTPUT, show_default="nothing is written",
        help="Also write the image that was made.")  # fmt: skip
@json_option
def replay(
    image: Path, bundle: Path | None, device: str, threads: int, out: Path | None, as_json: bool
) -> None:
    """Make IMAGE again from the settings inside it, and compare."""
    opened = usable_bundle(bundle or shipped_bundle())
    made, config, same = make_again(opened, image, device=device, threads=threads)
    written = [out] if out is not None else []
    for path in written:
        write_png(path, made.pixels, image_metadata(config, opened, made))
    if as_json or same:
        name, copies = click.format_filename(image), map(click.format_filename, written)
        finish(
            as_json, {"image": name, "identical": same}, written,
            f"{name}: identical", *(f"1 image in {copy}" for copy in copies),
        )  # fmt: skip
    if not same:
        raise click.ClickException(
            f"{click.format_filename(image)}: the pixels differ; same bundle and settings, another "
            "machine or library"
        )


@main.command(example="cspd-run doctor --backend tensorrt-rtx")
@option("--backend", default="onnxruntime", type=Choice(tuple(BACKENDS)), group=SPEED,
        help="Backend that decides the exit code.")  # fmt: skip
@json_option
def doctor(backend: str, as_json: bool) -> None:
    """Say what this machine can do, and how to fix the rest."""
    diagnosis = diagnose()
    if not as_json:
        for table in doctor_tables(diagnosis):
            print_table(table)
        for line in ("\nFix with", *fixes(diagnosis), "") if fixes(diagnosis) else [""]:
            click.echo(line)
    able = [report.name for report in diagnosis.backends if report.runs]
    next_one = backend if backend in able else next(iter(able))
    finish(
        as_json, diagnosis.model_dump(mode="json"), [],
        f"runs here: {', '.join(able)}; next: cspd-run generate --backend {next_one}",
    )  # fmt: skip
    if not diagnosis.runs(backend):
        raise click.ClickException(f"{backend} cannot run here")


if __name__ == "__main__":
    main()
