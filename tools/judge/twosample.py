"""Do two sets of images have one output distribution? `python -m cspd.tools.judge.twosample`.

For the shipped pair: `lossless` against `target` with other seeds, on the folders that `cspd-run
evaluate` leaves. Sets with equal seeds start from the same noise, image by image: they are pairs
and no independent samples, which every test here assumes, and are refused.

Three answers: the share of images that the classifier takes for their label, with a test of equal
shares; the Frechet distance of either set to real images, beside that of their seeds alone; and a
permutation test of the energy distance of the classifier's features within the classes, whose
false-alarm rate is its level. A distribution that differs by less than n images can show passes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from cspd.engines.console.commands import Commands
from cspd.engines.errors import CspdError
from cspd.runtime.store.images import read_metadata
from cspd.tools.judge.classifier import embed
from cspd.tools.judge.judges import check_count
from cspd.tools.judge.metrics import feature_stats, frechet_distance, load_judge
from cspd.tools.judge.run import IMAGES, load_images

MAX_PER_SIDE = 5000  # the matrix of distances has (2 n)^2 entries
PERMUTATIONS = 999
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True)
class ImageSet:
    """Features [N, D] of images, their classes [N], and whether each was recognised [N] bool."""

    features: Tensor
    labels: Tensor
    correct: Tensor

    @classmethod
    def join(cls, sets: list[ImageSet]) -> ImageSet:
        """All images of `sets`."""
        return cls(*(torch.cat([getattr(s, name) for s in sets]) for name in vars(sets[0])))


@dataclass(frozen=True)
class Comparison:
    """Two sets of n images each. p-values are of the hypothesis that nothing differs."""

    n: int
    accuracy: tuple[float, float]
    accuracy_by_seed: tuple[tuple[float, ...], tuple[float, ...]]
    accuracy_p: float
    frechet: tuple[float, float]
    frechet_by_seed: tuple[tuple[float, ...], tuple[float, ...]]
    frechet_between: float
    energy_p: float


@dataclass(frozen=True)
class StoredSet:
    """A set of images on disk: its folder, the class of every image, the seed behind them."""

    folder: Path
    labels: Tensor
    seed: int


def find_set(path: Path) -> StoredSet:
    """The one set of images below `path`, none of them opened but the first."""
    found = sorted(path.parent for path in path.rglob(IMAGES))
    if len(found) != 1:
        raise CspdError(
            f"{path}: holds {len(found)} sets of images, expected one; name the folder that "
            "cspd-run evaluate made for a method and seed"
        )
    folder = found[0]
    lines = [json.loads(line) for line in (folder / IMAGES).read_text().splitlines()]
    by_image = {line["image"]: line["label"] for line in lines}
    check_count(f"{path}: the number of images", len(by_image))
    missing = sorted(set(range(len(by_image))) - set(by_image))
    if missing:
        raise CspdError(f"{path}: image {missing[0]} is missing; run cspd-run evaluate again")
    labels = torch.tensor([by_image[image] for image in range(len(by_image))])
    config = read_metadata(folder / f"{0:05d}.png").get("config")
    if not isinstance(config, dict) or "seed" not in config:
        raise CspdError(f"{path}: the images do not say their seed; run cspd-run evaluate again")
    return StoredSet(folder, labels, config["seed"])


def check_sides(first: list[StoredSet], second: list[StoredSet]) -> None:
    """Raise CspdError unless the sets are independent and hold equally many images of a class."""
    seeds = [stored.seed for stored in (*first, *second)]
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None:
        raise CspdError(
            f"two of the sets have seed {twice}: they start from the same noise, image by image, "
            "and are pairs, no independent samples; give every set a seed of its own (differences "
            "of pairs: cspd-run evaluate)"
        )
    sides = [torch.cat([stored.labels for stored in side]) for side in (first, second)]
    _check_classes(*sides)


def _check_classes(first: Tensor, second: Tensor) -> None:
    if not torch.equal(first.bincount(), second.bincount()):
        raise CspdError(
            "the two sides have different numbers of images of a class; make them equal"
        )


def read_set(stored: StoredSet) -> ImageSet:
    """The images of a set, judged by the shipped classifier."""
    pixels, labels = load_images(stored.folder, len(stored.labels)), stored.labels
    images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    classifier, _ = load_judge()
    features = embed(classifier, images)
    return ImageSet(features, labels, classifier.logits(features).argmax(1) == labels)


def compare(first: list[ImageSet], second: list[ImageSet], seed: int = 0) -> Comparison:
    """Compare two methods; each list holds a set per seed, all seeds being different."""
    a, b = ImageSet.join(first), ImageSet.join(second)
    _check_classes(a.labels, b.labels)
    _, reference = load_judge()

    def distance(images: ImageSet) -> float:
        return frechet_distance(feature_stats(images.features), reference.train)

    sides = (first, second)
    return Comparison(
        n=len(a.labels),
        accuracy=(share(a), share(b)),
        accuracy_by_seed=tuple(tuple(map(share, side)) for side in sides),  # type: ignore[arg-type]
        accuracy_p=equal_shares(a.correct, b.correct),
        frechet=(distance(a), distance(b)),
        frechet_by_seed=tuple(tuple(map(distance, side)) for side in sides),  # type: ignore[arg-type]
        frechet_between=frechet_distance(feature_stats(a.features), feature_stats(b.features)),
        energy_p=energy_test(a, b, seed),
    )


def share(images: ImageSet) -> float:
    """Accuracy of the classifier on `images`."""
    return images.correct.double().mean().item()


def equal_shares(a: Tensor, b: Tensor) -> float:
    """p-value of equal probabilities behind trials [N] and [M] bool, normal approximation."""
    pooled = torch.cat([a, b]).double().mean()
    error = (pooled * (1 - pooled) * (1 / len(a) + 1 / len(b))).sqrt()
    gap = (a.double().mean() - b.double().mean()).abs()
    return 1.0 if error == 0 else torch.erfc(gap / error / 2**0.5).item()


def energy_test(a: ImageSet, b: ImageSet, seed: int = 0) -> float:
    """p-value of equal distributions of the features given the class: permutations within classes.

    Exact at any size: the observed split is one of `PERMUTATIONS` + 1 that are equally likely if
    they are equal. At most `MAX_PER_SIDE` images of each side are used.
    """
    a, b = (_thin(images) for images in (a, b))
    labels = torch.cat([a.labels, b.labels])
    both = torch.cat([a.features, b.features])
    distance = torch.cdist(both, both)
    sides = torch.cat([torch.ones(len(a.labels)), -torch.ones(len(b.labels))])
    by_class = labels.argsort(stable=True)
    observed = _energy(distance, sides)
    generator = torch.Generator().manual_seed(seed)
    larger = 0
    for keys in _keys(labels, generator):
        shuffled = torch.empty_like(sides)
        shuffled[by_class] = sides[keys]
        larger += int(_energy(distance, shuffled) >= observed)
    return (larger + 1) / (PERMUTATIONS + 1)


def _thin(images: ImageSet) -> ImageSet:
    step = -(-len(images.labels) // MAX_PER_SIDE)
    return ImageSet(*(value[::step] for value in vars(images).values()))


def _energy(distance: Tensor, sides: Tensor) -> float:
    """The energy statistic of a split `sides` [N] of +1 and -1, for equally many of each."""
    return -(sides @ distance @ sides).item()


def _keys(labels: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Random orders within the classes, each grouped by class."""
    for _ in range(PERMUTATIONS):
        yield (labels + torch.rand(len(labels), generator=generator)).argsort()


def lines(found: Comparison) -> list[str]:
    """The comparison in words."""

    def seeds(values: tuple[float, ...], form: str) -> str:
        return ", ".join(format(value, form) for value in values)

    accuracy, frechet = found.accuracy_by_seed, found.frechet_by_seed
    return [
        f"n = {found.n} images a side",
        f"accuracy {found.accuracy[0]:.2%} ({seeds(accuracy[0], '.1%')}) against "
        f"{found.accuracy[1]:.2%} ({seeds(accuracy[1], '.1%')}): p = {found.accuracy_p:.3f}",
        f"Frechet distance to real images, not FID: {found.frechet[0]:.2f} "
        f"({seeds(frechet[0], '.1f')}) against {found.frechet[1]:.2f} "
        f"({seeds(frechet[1], '.1f')}); between the sides {found.frechet_between:.2f}",
        f"energy distance of features within classes: p = {found.energy_p:.3f}, "
        f"{PERMUTATIONS} permutations",
    ]


@click.group(cls=Commands)
def main() -> None:
    """Compare two sets of images of the shipped pair."""


@main.command("compare")
@click.option("--first", "first", multiple=True, required=True, type=FOLDER, help="A seed each.")
@click.option("--second", "second", multiple=True, required=True, type=FOLDER, help="A seed each.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures.")
def command(first: tuple[Path, ...], second: tuple[Path, ...], as_json: bool) -> None:
    """Test whether --first and --second have one output distribution; every seed differs."""
    ours, theirs = ([find_set(path) for path in paths] for paths in (first, second))
    check_sides(ours, theirs)
    found = compare([read_set(stored) for stored in ours], [read_set(stored) for stored in theirs])
    record: dict[str, Any] = asdict(found)
    click.echo(json.dumps(record, indent=1) if as_json else "\n".join(lines(found)))


if __name__ == "__main__":
    main()
