"""`cspd-run evaluate`: how good are the images, and what does a method change about them?

Scores per method and seed, their spread over seeds, the noise floor (the target against itself with
other seeds), and image-by-image differences between methods that start from the same noise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from cspd.engines.bundle import Bundle
from cspd.engines.console.commands import (
    METHOD,
    OUTPUT,
    SPEED,
    WHAT,
    Verb,
    finish,
    json_option,
    new_out,
    option,
)
from cspd.engines.console.terminal import print_table
from cspd.engines.errors import CspdError
from cspd.engines.machine import check_machine
from cspd.engines.words import shell
from cspd.runtime.commands.options import backend_option, machine_options
from cspd.runtime.config import asked_config, check_config, make_config
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.progress import working
from cspd.runtime.sessions import Sessions
from cspd.runtime.store.outputs import distribution, environment, tool_version
from cspd.tools.judge import bootstrap
from cspd.tools.judge.bootstrap import Judged, interval
from cspd.tools.judge.judges import (
    FULL,
    Judge,
    check_count,
    find_judge,
    frechet_name,
    judge_options,
)
from cspd.tools.judge.run import Variant, balanced_labels, load_images, make_images
from cspd.tools.judge.tables import tables
from cspd.tools.parity.measure import finite
from cspd.tools.provenance import command_line, commit
from cspd.tools.settings import setting_name

SCHEMA = 1
RESULT = "evaluate.json"
PATH = click.Path(path_type=Path)
PEAK = 255.0
IMAGENET_CLASSES, FEW = 1000, 1000


@dataclass(frozen=True)
class Evaluation:
    """All variants of one run, scored; `say` gets a line of progress."""

    bundle: Bundle
    variants: list[Variant]
    judge: Judge
    out: Path
    say: Callable[[str], None]

    def run(self, pipeline: Pipeline) -> dict[str, Any]:
        """Make what is missing, score everything, and return the record of `evaluate.json`."""
        scores, pixels, judged = [], {}, {}
        for variant in self.variants:
            folder = self.out / variant.name
            make_images(pipeline, variant, folder, self.say)
            pixels[variant.name] = load_images(folder, variant.config.num_images)
            labels = np.array(variant.config.labels)
            found = self.judge.score(pixels[variant.name], labels, variant.config.seed)
            judged[variant.name] = found
            scores.append({
                "variant": variant.name, "setting": variant.setting,
                "distribution": distribution(variant.config),
                "config": variant.config.model_dump(mode="json", exclude={"labels"}),
                "folder": variant.name, "score": found.score, "interval": found.intervals(),
            })  # fmt: skip
        count = self.variants[0].config.num_images
        return finite({
            "schema": SCHEMA, "kind": "evaluate", "tool": tool_version(), "host": environment(),
            "bundle": {"sha256": self.bundle.sha256, "synthetic": self.bundle.manifest.synthetic},
            "n": count, "judge": self.judge.identity,
            "frechet_name": frechet_name(self.judge.identity["name"], count),
            "intervals": bootstrap.METHOD, "scores": scores,
            "spread": spread(self.variants, judged),
            "paired": self._paired(pixels, judged),
        })  # fmt: skip

    def _paired(
        self, pixels: dict[str, np.ndarray], judged: dict[str, Judged]
    ) -> list[dict[str, Any]]:
        """Differences of every setting from the first one at equal seeds, and the noise floor."""
        first = self.variants[0].setting
        by_seed = {(v.setting, v.config.seed): v for v in self.variants}
        pairs = [(v, by_seed[first, v.config.seed], "same noise")
                 for v in self.variants if v.setting != first]  # fmt: skip
        seeds = [v for v in self.variants if v.setting == first]
        pairs += [(b, a, "noise floor: other seed") for a, b in combinations(seeds, 2)]
        return [
            {"variant": one.name, "setting": one.setting, "against": base.name, "comparison": what,
             "seed": one.config.seed, **paired_difference(pixels[one.name], pixels[base.name]),
             "differences": score_differences(judged[one.name], judged[base.name])}
            for one, base, what in pairs
        ]  # fmt: skip


def score_differences(one: Judged, base: Judged) -> dict[str, dict[str, Any]]:
    """Scores of `one` less those of `base`, with the 95 % interval of each difference.

    Sets with one seed were redrawn alike, so what their shared noise does cancels in it.
    """
    found = {}
    for name in one.redrawn:
        value = one.score[name] - base.score[name]
        ends = interval(value, one.redrawn[name] - base.redrawn[name])
        found[name] = {"value": value, "interval": ends}
    return found


def paired_difference(images: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Image-by-image difference of two sets [N, H, W, C] uint8.

    `rmse` in units of the full range, mean over the images; `psnr_db` the median, at most 99;
    `identical` the share of images that are equal to the last bit; `shift` the difference of the
    mean brightness, which noise alone brings near 0.
    """
    pairs = zip(images, base, strict=True)  # one by one, the sets may be larger than the memory
    found = [_difference(image, other) for image, other in pairs]
    rmse, shift = (np.array(values) for values in zip(*found, strict=True))
    psnr = np.minimum(99.0, -20 * np.log10(np.maximum(rmse, 1e-12)))
    return {
        "rmse": float(rmse.mean()),
        "psnr_db": float(np.median(psnr)),
        "identical": float((rmse == 0).mean()),
        "shift": float(shift.mean()),
    }


def _difference(image: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Root mean square and mean of the difference, in units of the full range."""
    difference = (image.astype(np.float64) - other) / PEAK
    return float(np.sqrt(np.square(difference).mean())), float(difference.mean())


def spread(variants: list[Variant], judged: dict[str, Judged]) -> list[dict[str, Any]]:
    """Every score of every setting over its seeds: mean, its 95 % interval, standard deviation."""
    settings: dict[str, list[Judged]] = {}
    for variant in variants:
        settings.setdefault(variant.setting, []).append(judged[variant.name])
    return [_over_seeds(setting, found, name)
            for setting, found in settings.items() for name in found[0].score]  # fmt: skip


def _over_seeds(setting: str, found: list[Judged], name: str) -> dict[str, Any]:
    values = [judged.score[name] for judged in found]
    mean, ends = statistics.fmean(values), None
    if all(name in judged.redrawn for judged in found):
        ends = interval(mean, torch.stack([judged.redrawn[name] for judged in found]).mean(0))
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"setting": setting, "score": name, "seeds": len(values), "mean": mean,
            "interval": ends, "sd": deviation}  # fmt: skip


def make_variants(
    bundle: Bundle, methods: list[dict[str, Any]], seeds: list[int], num_images: int,
    base: dict[str, Any],
) -> list[Variant]:  # fmt: skip
    """Every method with every seed; the first method is the one that others are compared with.

    Raises CspdError if a setting is asked for twice, or if the bundle cannot run one.
    """
    manifest = bundle.manifest
    labels = balanced_labels(num_images, manifest.geometry.num_classes)
    images: dict[str, Any] = {"labels": labels, "num_images": num_images}
    shared: dict[str, Any] = {**manifest.defaults, **images}
    shared |= {key: value for key, value in base.items() if key in ("batch_size", "backend")}
    usual = make_config(**shared)
    found: dict[tuple[str, int], Variant] = {}
    for method in methods:
        for seed in seeds:
            config = asked_config(method, {**manifest.defaults, **base, **images, "seed": seed})
            setting = setting_name(config, usual)
            if (setting, config.seed) in found:
                raise CspdError(f"evaluate: {setting}, seed {seed} is asked for twice")
            check_config(config, manifest)
            found[setting, config.seed] = Variant(config=config, setting=setting)
    return list(found.values())


def parse_method(text: str) -> dict[str, Any]:
    """Settings of "cspd:gamma=16,prefill=0": a method and options that differ from the others'."""
    method, _, rest = text.partition(":")
    values: dict[str, Any] = {"method": method}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise CspdError(f"--method {text}: {part!r} is not of the form option=value")
        values[name.strip().replace("-", "_")] = value.strip()
    return values


@click.command(
    "evaluate", cls=Verb,
    example='cspd-run evaluate --method target --method "target:num_iter=8" --method cspd',
)  # fmt: skip
@click.argument("bundle", type=PATH, required=False)
@option(
    "--num-images",
    type=click.IntRange(1),
    group=WHAT,
    show_default="50000 for 1000 classes, else 1000",
    help="Images per method and seed.",
)
@option(
    "--seeds",
    default="0,1",
    group=WHAT,
    help="Seeds; two and more show noise.",
)
@judge_options
@option(
    "--method",
    "methods",
    multiple=True,
    default=("target", "cspd"),
    group=METHOD,
    help='Methods, the first is the base: "target", "target:num_iter=8", "cspd:gamma=16".',
)
@option(
    "--num-iter",
    type=int,
    group=METHOD,
    show_default="the bundle's",
    help="Autoregressive steps.",
)
@option(
    "--head-steps", type=int, group=METHOD, show_default="the bundle's", help="Denoising steps."
)
@option(
    "--batch-size",
    type=click.IntRange(1),
    default=10,
    group=SPEED,
    help="Images computed together.",
)
@backend_option
@machine_options
@option(
    "--out",
    type=PATH,
    show_default="out/evaluate-001, counting up",
    group=OUTPUT,
    help="Folder of images and scores; one that is there already is resumed.",
)
@json_option
@option("--quiet", is_flag=True, group=OUTPUT, help="No progress.")
def command(
    bundle: Path | None, methods: tuple[str, ...], num_images: int | None, seeds: str,
    num_iter: int | None, head_steps: int | None, batch_size: int, backend: str, device: str,
    threads: int, inception: Path | None, reference: Path | None, out: Path | None, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Score the images of BUNDLE, by default the shipped pair; resumes where it was interrupted."""
    from cspd.runtime.settings import shipped_bundle, usable_bundle

    opened = usable_bundle(bundle or shipped_bundle())
    given = {"num_iter": num_iter, "head_steps": head_steps}
    base: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    base |= {"batch_size": batch_size, "backend": backend}
    count = num_images or usual_count(opened)
    check_count("--num-images", count)
    variants = make_variants(opened, [parse_method(m) for m in methods], _seeds(seeds), count, base)

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    check_machine(opened, backend, device)
    judge = find_judge(opened.manifest, inception, reference)
    judge.check(opened.manifest.geometry.image_channels)
    pipeline = Pipeline(
        Sessions(opened, backend, device, threads), working=partial(working, quiet=quiet)
    )
    if out is None:
        out = new_out("evaluate")
        say(f"images in {out}; if this is stopped, add --out {out} to resume")
    record = Evaluation(opened, variants, judge, out, say).run(pipeline)
    record |= {"command": command_line(), "commit": commit()}
    (out / RESULT).write_text(json.dumps(record, indent=1) + "\n")
    if not as_json:
        for table in tables(record):
            print_table(table)
    name = shell(out)
    finish(
        as_json, record, [out / RESULT, *(out / variant.name for variant in variants)],
        f"{len(variants) * count} images scored in {name}; next: cspd-run report {name}",
    )  # fmt: skip


def usual_count(bundle: Bundle) -> int:
    """Images per set: as many as the papers take for ImageNet, fewer for small pairs."""
    return FULL if bundle.manifest.geometry.num_classes == IMAGENET_CLASSES else FEW


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise CspdError(f"--seeds is {text!r}, expected whole numbers with commas") from None


if __name__ == "__main__":
    command()
