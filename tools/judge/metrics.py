"""How good are the samples of the shipped pair? `python -m cspd.tools.judge.metrics reference OUT`.

Everything is measured in the feature space of our small Fashion-MNIST classifier. The Frechet
distance below is therefore NOT the FID of papers, which is defined by an Inception network: it can
only be compared with figures made by this module with the same classifier and number of images.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import click
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.export.pairs import FASHION_CLASSES
from cspd.tools.demo.fashion import load_images
from cspd.tools.judge.bootstrap import replicates
from cspd.tools.judge.classifier import Classifier, embed, load_classifier

PER_CLASS = 1000  # real images per class behind each half of the reference
KEPT_PER_CLASS = 200  # of these, whose features are stored: for neighbours and for the noise floor
NEIGHBOURS = 3
MIN_IMAGES = 100


@dataclass(frozen=True)
class FeatureStats:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Tensor
    cov: Tensor


@dataclass(frozen=True)
class Reference:
    """Real data under one classifier.

    `train`, `test`: statistics of 10,000 images of either split, equally many of each class;
    `features` [2000, D] float32 of test images, row i of class i mod 10; `class_distance` [10]
    mean distance between two test images of a class; `accuracy` of the classifier on the test half.
    """

    train: FeatureStats
    test: FeatureStats
    features: Tensor
    class_distance: Tensor
    accuracy: float


@dataclass(frozen=True)
class Score:
    """Quality of `n` labelled images. NOT FID: see the module's first lines.

    `accuracy`: share of images that the classifier takes for their label; `real_accuracy` the same
    for real test images. `frechet`, `frechet_test`: Frechet distance to real training and test
    images; `frechet_floor`: distance of min(n, 2000) real test images to the training images, what
    a perfect generator would get. `precision`, `recall` in 0..1: share of samples near real images,
    share of real images near samples. `diversity`: mean distance within a class over that of real
    images, mean over the classes; `diversity_min` its lowest class (0 = collapsed, 1 = as real).
    """

    n: int
    accuracy: float
    real_accuracy: float
    frechet: float
    frechet_test: float
    frechet_floor: float
    precision: float
    recall: float
    diversity: float
    diversity_min: float


def score_images(images: Tensor, labels: Tensor) -> Score:
    """Score `images` [N, 1, 28, 28] in [-1, 1] that were made for `labels` [N], 0..9.

    The result is NOT FID (no Inception network is involved) and depends on N: compare equal N, and
    give every class equally many images, as the reference does. Raises CspdError for fewer than 100
    images, other shapes, values that are not finite or out of range.
    """
    return score_features(image_features(images, labels), labels)


def image_features(images: Tensor, labels: Tensor) -> Tensor:
    """Features [N, D] of `images`; raises as `score_images` does."""
    _check_images(images, labels)
    classifier, _ = load_judge()
    return embed(classifier, images.float())


def score_features(features: Tensor, labels: Tensor) -> Score:
    """The score of images with these `features` [N, D]."""
    classifier, reference = load_judge()
    predicted = classifier.logits(features).argmax(1)
    stats = feature_stats(features)
    count = min(len(features), len(reference.features))
    real = reference.features[:count]
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:count]
    precision, recall = precision_recall(real, features[chosen])
    ratios = diversity(features, labels, reference.class_distance)
    return Score(
        n=len(features),
        accuracy=(predicted == labels).double().mean().item(),
        real_accuracy=reference.accuracy,
        frechet=frechet_distance(stats, reference.train),
        frechet_test=frechet_distance(stats, reference.test),
        frechet_floor=frechet_distance(feature_stats(real), reference.train),
        precision=precision,
        recall=recall,
        diversity=ratios.mean().item(),
        diversity_min=ratios.min().item(),
    )


def redrawn_scores(features: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Accuracy and Frechet distance of redrawn sets, see `bootstrap.replicates`."""
    classifier, reference = load_judge()
    correct = (classifier.logits(features).argmax(1) == labels).double()
    distance = FrechetTo(reference.train, features)
    return {
        "accuracy": replicates(lambda rows: correct[rows].mean().item(), labels, seed),
        "frechet": replicates(distance, labels, seed),
    }


def feature_stats(features: Tensor) -> FeatureStats:
    """Mean and unbiased covariance of `features` [N, D]."""
    features = features.double()
    return FeatureStats(features.mean(0), features.T.cov())


def frechet_distance(first: FeatureStats, second: FeatureStats) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians.

    The trace of the root of C1 C2 is the sum of the roots of the eigenvalues of the symmetric
    C1^(1/2) C2 C1^(1/2), which stays real where a covariance is singular. (Dowson, Landau 1982.)
    """
    values, vectors = torch.linalg.eigh(first.cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.cov @ root).clamp(min=0).sqrt().sum()
    shift = (first.mean - second.mean).square().sum()
    return max(0.0, (shift + first.cov.trace() + second.cov.trace() - 2 * cross).item())


class FrechetTo:
    """Frechet distance to `reference` of rows of `features` [N, D], cheap to call many times.

    For centred rows X the roots of the eigenvalues of C X'X are summed. X C X', [N, N], has the
    same ones and is the smaller for few images; R'X'X R, [D, D], with C = R R' for many.
    """

    def __init__(self, reference: FeatureStats, features: Tensor) -> None:
        self.reference, self.features = reference, features.double()
        self.few = len(features) < features.shape[1]
        cov = reference.cov.double()
        if self.few:
            self.turned = self.features @ cov @ self.features.T
        else:
            values, vectors = torch.linalg.eigh(cov)
            self.turned = self.features @ (vectors * values.clamp(min=0).sqrt())

    def __call__(self, rows: Tensor) -> float:
        """The distance of the rows [M] to the reference."""
        images, free = self.features[rows], len(rows) - 1
        mean = images.mean(0)
        cross = torch.linalg.eigvalsh(self._products(rows) / free).clamp(min=0).sqrt().sum()
        trace = (images - mean).square().sum() / free + self.reference.cov.trace()
        return ((mean - self.reference.mean).square().sum() + trace - 2 * cross).item()

    def _products(self, rows: Tensor) -> Tensor:
        """X C X' or R'X'X R of the rows X less their mean."""
        if self.few:
            products = self.turned[rows][:, rows]
            products = products - products.mean(0)
            return products - products.mean(1, keepdim=True)
        turned = self.turned[rows]
        turned = turned - turned.mean(0)
        return turned.T @ turned


def precision_recall(
    real: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of `samples` [N, D] within the real set, and of `real` [M, D] within the samples.

    A point is within a set if it is no farther from a member than that member's k-th neighbour in
    the set. Use equal numbers of both. (Kynkaanniemi et al. 2019, improved precision and recall.)
    """
    between = torch.cdist(real, samples)
    precision = (between <= _radius(real, neighbours)[:, None]).any(0)
    recall = (between <= _radius(samples, neighbours)).any(1)
    return precision.double().mean().item(), recall.double().mean().item()


def _radius(points: Tensor, neighbours: int) -> Tensor:
    """Distance [N] from each of `points` [N, D] to its k-th neighbour, itself not counted."""
    return torch.cdist(points, points).kthvalue(neighbours + 1, dim=1).values


def class_distances(features: Tensor, labels: Tensor) -> Tensor:
    """Mean distance between two images of a class, [10]; NaN for classes with fewer than two."""
    found = []
    for label in range(len(FASHION_CLASSES)):
        rows = features[labels == label].double()
        pairs = len(rows) * (len(rows) - 1)
        found.append(torch.cdist(rows, rows).sum() / pairs if pairs else torch.tensor(torch.nan))
    return torch.stack([value.double() for value in found])


def diversity(features: Tensor, labels: Tensor, real: Tensor) -> Tensor:
    """Within-class distance of `features` [N, D] over `real` [10], for classes with two or more."""
    ratios = class_distances(features, labels) / real
    return ratios[ratios.isfinite()]


def _check_images(images: Tensor, labels: Tensor) -> None:
    if len(images) < MIN_IMAGES:
        raise CspdError(f"scores need {MIN_IMAGES} images or more, got {len(images)}")
    if labels.shape != images.shape[:1]:
        raise CspdError(f"scores: {len(images)} images, but labels are {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= len(FASHION_CLASSES):
        raise CspdError(f"scores: labels reach {int(labels.min())}..{int(labels.max())}, not 0..9")
    if not images.abs().max() <= 1.001:
        raise CspdError("scores: images hold NaN or values beyond [-1, 1]; clamp them first")


@cache
def load_judge() -> tuple[Classifier, Reference]:
    """The shipped classifier and the real data as it sees them.

    Raises CspdError if they do not belong together.
    """
    shipped = files("cspd.demo_pair")
    with as_file(shipped / "classifier.safetensors") as weights:
        classifier, digest = load_classifier(weights), _digest(weights)
    with as_file(shipped / "reference.safetensors") as path:
        return classifier, load_reference(path, digest)


def load_reference(path: Path, classifier_sha256: str) -> Reference:
    """The reference in `path`; raises CspdError unless that classifier made it."""
    try:
        with safe_open(path, framework="pt") as file:
            made_with = (file.metadata() or {}).get("classifier_sha256")
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CspdError(f"{path}: no reference of real data ({error})") from error
    if made_with != classifier_sha256:
        raise CspdError(
            f"{path}: made with another classifier; rebuild with: "
            "python -m cspd.tools.judge.metrics reference OUT"
        )
    return Reference(
        train=FeatureStats(found["train.mean"], found["train.cov"]),
        test=FeatureStats(found["test.mean"], found["test.cov"]),
        features=found["features"].float(),
        class_distance=found["class_distance"],
        accuracy=found["accuracy"].item(),
    )


def save_reference(weights: Path, out: Path) -> None:
    """Measure the real data under the classifier in `weights` and write the reference to `out`."""
    classifier = load_classifier(weights)
    tensors: dict[str, Tensor] = {}
    for split, name in (("train", "train"), ("t10k", "test")):
        images, labels = load_images(split)
        rows = interleaved(labels, PER_CLASS)
        features, labels = embed(classifier, images[rows]), labels[rows]
        stats = feature_stats(features)
        tensors |= {f"{name}.mean": stats.mean, f"{name}.cov": stats.cov}
    # The loop ends with the test images.
    tensors["features"] = features[: KEPT_PER_CLASS * len(FASHION_CLASSES)].half()
    tensors["class_distance"] = class_distances(features, labels)
    tensors["accuracy"] = (classifier.logits(features).argmax(1) == labels).double().mean()
    metadata = {
        "classifier_sha256": _digest(weights),
        "data": "Fashion-MNIST (Zalando Research, MIT licence)",
    }
    save_file({name: t.contiguous() for name, t in tensors.items()}, out, metadata)


def interleaved(labels: Tensor, per_class: int) -> Tensor:
    """Rows of the first `per_class` members of each class, [10 * per_class], class i mod 10."""
    classes = range(len(FASHION_CLASSES))
    return torch.stack([(labels == c).nonzero()[:per_class, 0] for c in classes], 1).flatten()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@click.group()
def main() -> None:
    """Measure real data, so that samples can be scored without it."""


@main.command("reference")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--classifier", "weights", type=click.Path(path_type=Path), required=True)
def reference_command(out: Path, weights: Path) -> None:
    """Write the statistics of the real data under a classifier to OUT."""
    save_reference(weights, out)
    reference = load_reference(out, _digest(weights))
    distance = frechet_distance(reference.train, reference.test)
    click.echo(f"{out}: Frechet distance between the real halves {distance:.3f} (noise floor)")


if __name__ == "__main__":
    main()
