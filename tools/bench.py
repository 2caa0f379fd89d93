"""`cspd-run bench`: the tables and figures of the paper, measured on a bundle of your own."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from cspd.engines.backends import BACKENDS
from cspd.engines.bundle import Bundle, open_bundle
from cspd.engines.errors import CspdError
from cspd.runtime.config import check_config
from cspd.tools.bench_plan import Point, Scale, make_plan
from cspd.tools.bench_results import Results
from cspd.tools.bench_run import JOURNAL, PIXELS, Bench, Journal, make_header, read_lines
from cspd.tools.bench_tables import TABLES, readme_table
from cspd.tools.evaluate_judges import Judge, check_count, find_judge
from cspd.tools.provenance import command_line, commit
from cspd.tools.replay import AcceptancePattern, load_pattern
from cspd.tools.terminal import print_table
from cspd.tools.verdict import verdict_table

PATH = click.Path(path_type=Path)


@click.command("bench")
@click.argument("bundle", type=PATH, required=False)
@click.option(
    "--out",
    type=PATH,
    default=Path("out/bench"),
    show_default=True,
    help="Results; resumes behind the last one.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Speed and acceptance only, under two minutes for the shipped pair.",
)
@click.option(
    "--images", type=click.IntRange(0), help="Images behind a quality figure.  [default: 1000]"
)
@click.option(
    "--repeats", type=click.IntRange(1), help="Measured batches per setting.  [default: 3]"
)
@click.option(
    "--batch-size",
    "batch_sizes",
    multiple=True,
    type=click.IntRange(1),
    help="Batch sizes of table 1.",
)
@click.option("--no-compile", is_flag=True, help="Leave out torch.compile.")
@click.option(
    "--num-iter", type=int, help="Autoregressive steps of everything but the shorter baselines."
)
@click.option("--head-steps", type=int, help="Denoising steps.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--backend", type=click.Choice(list(BACKENDS)), default="onnxruntime", show_default=True
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=0, show_default="all cores", help="CPU threads.")
@click.option(
    "--inception", type=PATH, help="Inception weights of torch-fidelity, for ImageNet models."
)
@click.option("--reference", type=PATH, help="Statistics of real images: .npz with mu and sigma.")
@click.option(
    "--replay-acceptance",
    "replayed",
    type=PATH,
    help="Random weights only: verdicts as in this finished benchmark.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and measure nothing.")
@click.option("--readme", is_flag=True, help="Print the table of the README from finished results.")
@click.option("--json", "as_json", is_flag=True, help="Print all tables as JSON.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    bundle: Path | None, out: Path, quick: bool, images: int | None, repeats: int | None,
    batch_sizes: tuple[int, ...], no_compile: bool, num_iter: int | None, head_steps: int | None,
    seed: int, backend: str, device: str, threads: int, inception: Path | None,
    reference: Path | None, replayed: Path | None, dry_run: bool, readme: bool, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Measure speed, acceptance and quality of BUNDLE, by default the shipped pair."""
    from cspd.runtime.cli import shipped_bundle

    if readme:
        click.echo(readme_table(load_results(out)).markdown(), nl=False)
        return
    opened = open_bundle(bundle or shipped_bundle())
    scale = make_scale(quick, images, repeats, batch_sizes, no_compile)
    options = {"num_iter": num_iter, "head_steps": head_steps, "seed": seed, "backend": backend}
    base = {name: value for name, value in options.items() if value is not None}
    points = make_plan(opened.manifest, base, scale)
    for point in points:
        check_config(point.config, opened.manifest)
    if dry_run:
        click.echo(plan_text(points))
        return

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    origin = {"command": command_line(), "commit": commit()}
    pattern = acceptance_pattern(opened, replayed)
    judge = quality_judge(opened, points, inception, reference)
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
    lines = [
        f"{point.id}: {point.repeats} x {point.config.batch_size} images"
        f"{', scored' if point.quality else ''}; {', '.join(point.serves)}"
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
    (out / "tables.md").write_text(text)
    if as_json:
        record = {
            "schema": 1,
            "header": results.header,
            "tables": {n: vars(t) for n, t in filled.items()},
        }
        click.echo(json.dumps(record, indent=1))
        return
    for table in filled.values():
        print_table(table)
    click.echo(f"{out / 'tables.md'}")


if __name__ == "__main__":
    command()
