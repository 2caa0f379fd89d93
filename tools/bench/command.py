"""`cspd-run bench`: the tables and figures of the paper, measured on a bundle of your own."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from cspd.engines.bundle import Bundle
from cspd.engines.console.commands import (
    METHOD,
    OUTPUT,
    WHAT,
    Verb,
    finish,
    json_option,
    new_out,
    option,
)
from cspd.engines.console.idle_options import other_options, refuse_idle
from cspd.engines.console.terminal import print_table
from cspd.engines.errors import CspdError
from cspd.engines.machine import check_machine
from cspd.engines.words import shell
from cspd.runtime.commands.options import backend_option, machine_options
from cspd.runtime.config import check_config
from cspd.tools.bench.plan import Point, Scale, make_plan, titles
from cspd.tools.bench.replay import AcceptancePattern, load_pattern
from cspd.tools.bench.results import Results
from cspd.tools.bench.run import JOURNAL, PIXELS, Bench, Journal, make_header, read_lines
from cspd.tools.bench.tables import TABLES, readme_table
from cspd.tools.bench.verdict import verdict_table
from cspd.tools.judge.judges import Judge, check_count, find_judge, judge_options
from cspd.tools.provenance import command_line, commit

PATH = click.Path(path_type=Path)
TABLES_FILE = "tables.md"


@click.command(
    "bench", cls=Verb,
    example="cspd-run bench --quick\n"
    "cspd-run bench bundles/mar-h-b --images 0 --batch-size 1 --batch-size 8 --dry-run",
)  # fmt: skip
@click.argument("bundle", type=PATH, required=False)
@option(
    "--quick",
    is_flag=True,
    group=WHAT,
    help="Speed and acceptance only, under two minutes for the shipped pair.",
)
@option(
    "--images",
    type=click.IntRange(0),
    group=WHAT,
    show_default="1000, with --quick 0",
    help="Images behind a quality figure.",
)
@option(
    "--repeats",
    type=click.IntRange(1),
    group=WHAT,
    show_default="3, with --quick 1",
    help="Measured batches per setting.",
)
@option(
    "--batch-size",
    "batch_sizes",
    multiple=True,
    type=click.IntRange(1),
    group=WHAT,
    show_default="1, 10, 50; with --quick 1, 4",
    help="Batch sizes of table 1; may be repeated.",
)
@option("--no-compile", is_flag=True, group=WHAT, help="Leave out torch.compile.")
@judge_options
@option(
    "--replay-acceptance",
    "replayed",
    type=PATH,
    group=WHAT,
    show_default="measure it",
    help="Random weights only: verdicts as in this finished benchmark.",
)
@option(
    "--num-iter",
    type=int,
    group=METHOD,
    show_default="one per token",
    help="Autoregressive steps of everything but the shorter baselines.",
)
@option(
    "--head-steps", type=int, group=METHOD, show_default="the bundle's", help="Denoising steps."
)
@option("--seed", type=int, default=0, group=METHOD, help="Seed of all settings.")
@backend_option
@machine_options
@option(
    "--out",
    type=PATH,
    show_default="out/bench-001, counting up",
    group=OUTPUT,
    help="Folder of the results; one that is there already is resumed.",
)
@option("--dry-run", is_flag=True, group=OUTPUT, help="Show the plan and measure nothing.")
@option(
    "--readme",
    is_flag=True,
    group=OUTPUT,
    help="Print the table of the README from the finished results in --out.",
)
@json_option
@option("--quiet", is_flag=True, group=OUTPUT, help="No progress.")
def command(
    bundle: Path | None, out: Path | None, quick: bool, images: int | None, repeats: int | None,
    batch_sizes: tuple[int, ...], no_compile: bool, num_iter: int | None, head_steps: int | None,
    seed: int, backend: str, device: str, threads: int, inception: Path | None,
    reference: Path | None, replayed: Path | None, dry_run: bool, readme: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Measure speed, acceptance and quality of BUNDLE, by default the shipped pair."""
    from cspd.runtime.settings import shipped_bundle, usable_bundle

    if readme:
        refuse_idle(other_options("readme", "out"), "not used with --readme; leave it out")
        if out is None:
            raise click.UsageError("--readme: name the folder of finished results with --out")
        click.echo(readme_table(load_results(out)).markdown(), nl=False)
        return
    if quick:
        refuse_idle(["no_compile"], "--quick leaves torch.compile out already")
    opened = usable_bundle(bundle or shipped_bundle())
    scale = make_scale(quick, images, repeats, batch_sizes, no_compile)
    if not scale.quality_images:
        scores = ["inception", "reference"]
        refuse_idle(scores, "nothing is scored here; give --images, or leave it out")
    options = {"num_iter": num_iter, "head_steps": head_steps, "seed": seed, "backend": backend}
    base = {name: value for name, value in options.items() if value is not None}
    points = make_plan(opened.manifest, base, scale)
    for point in points:
        check_config(point.config, opened.manifest)
    if dry_run:
        plan = {
            "schema": 1,
            "kind": "bench plan",
            "points": [p.model_dump(mode="json") for p in points],
        }
        finish(as_json, plan, [], plan_text(points), "next: the same command without --dry-run")
        return

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    check_machine(opened, backend, device)
    origin = {"command": command_line(), "commit": commit()}
    pattern = acceptance_pattern(opened, replayed)
    judge = quality_judge(opened, points, inception, reference)
    if out is None:
        out = new_out("bench")
        say(f"results in {out}; if this is stopped, add --out {out} to resume")
    journal = Journal(out, make_header(opened, points, threads, pattern) | origin)
    Bench(opened, journal, device, threads, say, pattern).run(points)
    judge_points(journal, points, judge)
    show(Results(journal.lines), out, as_json)


def make_scale(
    quick: bool, images: int | None, repeats: int | None, batch_sizes: tuple[int, ...],
    no_compile: bool,
) -> Scale:  # fmt: skip
    """How much to measure."""
    usual = Scale.quick() if quick else Scale()
    images = usual.quality_images if images is None else images
    if images:
        check_count("--images", images)
    peers = tuple(p for p in usual.peers if not (no_compile and p == "torch.compile"))
    sizes = tuple(sorted(set(batch_sizes))) or usual.batch_sizes
    return Scale(repeats or usual.repeats, images, sizes, peers, usual.steps)


def acceptance_pattern(bundle: Bundle, folder: Path | None) -> AcceptancePattern | None:
    """The pattern measured in `folder`; only bundles with random weights may borrow one."""
    if folder is None:
        return None
    if not bundle.manifest.synthetic:
        raise CspdError(
            "--replay-acceptance: this bundle has trained weights, whose acceptance is measured"
        )
    return load_pattern(load_results(folder))


def plan_text(points: list[Point]) -> str:
    """A line per point, and the totals."""
    names = titles(points)
    lines = [
        f"{names[point.id]}: {point.repeats} x {point.config.batch_size} images"
        f"{', scored' if point.quality else ''}"
        for point in points
    ]
    images = sum(point.repeats * point.config.batch_size for point in points)
    return "\n".join([*lines, f"{len(points)} settings, {images} images"])


def quality_judge(
    bundle: Bundle, points: list[Point], inception: Path | None, reference: Path | None
) -> Judge | None:
    """The judge, if anything is to be scored; CspdError if it could not score."""
    if not any(point.quality for point in points):
        return None
    judge = find_judge(bundle.manifest, inception, reference)
    judge.check(bundle.manifest.geometry.image_channels)
    return judge


def judge_points(journal: Journal, points: list[Point], judge: Judge | None) -> None:
    """Score the kept images of every point that is not scored yet."""
    for point in points:
        if judge is None or not point.quality or journal.has(point.id, -2):
            continue
        folder = journal.path.parent / PIXELS / point.id
        found = sorted(path for path in folder.glob("*.npy") if not path.name.startswith("."))
        if len(found) < point.repeats:
            continue  # skipped on this machine
        pixels = np.concatenate([np.load(path) for path in found[: point.repeats]])
        labels = np.array([point.config.label_of(index) for index in range(len(pixels))])
        judged = judge.score(pixels, labels, point.config.seed)
        journal.append({
            "kind": "score", "point": point.id, "repeat": -2, "judge": judge.identity,
            "score": judged.score, "interval": judged.intervals(),
            "redrawn": {name: found.tolist() for name, found in judged.redrawn.items()},
        })  # fmt: skip


def load_results(folder: Path) -> Results:
    """The results in the folder of a benchmark."""
    path = folder / JOURNAL
    if not path.is_file():
        raise CspdError(f"{path}: not found; run cspd-run bench --out {folder} first")
    return Results(read_lines(path))


def show(results: Results, out: Path, as_json: bool) -> None:
    """Write `tables.md` and print all tables."""
    makers = {**TABLES, "verdict": verdict_table}
    tables = {name: make(results) for name, make in makers.items()}
    filled = {name: table for name, table in tables.items() if table.rows}
    text = "\n".join(table.markdown() for table in filled.values())
    (out / TABLES_FILE).write_text(text)
    if not as_json:
        for table in filled.values():
            print_table(table)
    record = {
        "schema": 1,
        "header": results.header,
        "tables": {n: vars(t) for n, t in filled.items()},
    }
    name = shell(out)
    finish(
        as_json, record, [out / JOURNAL, out / TABLES_FILE],
        f"{len(results.points)} settings in {name}; next: cspd-run report {name}",
    )  # fmt: skip


if __name__ == "__main__":
    command()
