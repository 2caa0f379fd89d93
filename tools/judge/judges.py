"""Who scores images: the shipped classifier for the shipped pair, Inception for ImageNet models.

Only Inception features make a Frechet distance an FID, and only 50,000 images make it an FID-50K;
names of results are chosen here and nowhere else.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
import numpy as np
import torch

from cspd.engines.console.commands import WHAT, option
from cspd.engines.errors import CspdError, MissingExtraError, SettingError
from cspd.engines.manifest import Manifest
from cspd.export.pairs import FASHION_CLASSES
from cspd.tools.judge.bootstrap import Judged, replicates
from cspd.tools.judge.metrics import (
    MIN_IMAGES,
    FeatureStats,
    FrechetTo,
    image_features,
    load_judge,
    precision_recall,
    redrawn_scores,
    score_features,
)

Command = TypeVar("Command", bound=Callable[..., Any])

INCEPTION_CHUNK = 32
# The network that FID is defined by.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FULL = 50_000
NEIGHBOUR_IMAGES = 10_000


def judge_options(command: Command) -> Command:
    """Options that choose who scores images, and against what."""
    path = click.Path(path_type=Path)
    reference = option(
        "--reference", type=path, group=WHAT, show_default="none",
        help="Statistics of real images: .npz with mu and sigma.",
    )  # fmt: skip
    inception = option(
        "--inception", type=path, group=WHAT, show_default="the shipped classifier",
        help="Inception weights of torch-fidelity, for ImageNet models.",
    )  # fmt: skip
    return inception(reference(command))


class Judge(Protocol):
    """Scores sets of images."""

    @property
    def identity(self) -> dict[str, str]:
        """Names and hashes of the feature extractor and the reference statistics."""
        ...

    def check(self, image_channels: int) -> None:
        """Raise CspdError if images of so many channels could not be scored."""
        ...

    def score(self, pixels: np.ndarray, labels: np.ndarray, seed: int) -> Judged:
        """Scores by name of `pixels` [N, H, W, C] uint8 that were made for `labels` [N].

        `seed` is that of the images: sets with one seed are redrawn alike for their intervals.
        """
        ...


def check_count(option: str, count: int) -> None:
    """Raise SettingError for fewer images than are scored; `option` says who asked for so many."""
    if count < MIN_IMAGES:
        raise SettingError(f"{option} is {count}; scores need {MIN_IMAGES} images or more")


def frechet_name(extractor: str, count: int) -> str:
    """What a Frechet distance between `count` images and the reference may be called."""
    if extractor != "inception":
        return f"Frechet distance, {extractor} features, n = {count} (not FID)"
    return "FID-50K" if count == FULL else f"FID, n = {count} (not FID-50K)"


def find_judge(manifest: Manifest, inception: Path | None, reference: Path | None) -> Judge:
    """The judge for a bundle; CspdError says what is missing."""
    if inception or reference:
        if not (inception and reference):
            raise CspdError("--inception and --reference belong together: weights and statistics")
        for path in (inception, reference):
            if not path.is_file():
                raise CspdError(f"{path}: not found; expected a file of weights or statistics")
        return InceptionJudge(inception, reference)
    if manifest.class_names == FASHION_CLASSES and manifest.geometry.image_channels == 1:
        return ClassifierJudge()
    raise CspdError(
        "no judge for this bundle: give the Inception weights of torch-fidelity with --inception "
        "and the reference statistics (mu, sigma) with --reference"
    )


def import_torch_fidelity() -> None:
    """Import torch-fidelity, also where the operators of its torchvision cannot be loaded.

    A torchvision built for CUDA does not load them beside a PyTorch built for the CPU. Nothing here
    calls one, so naming them is enough. Raises MissingExtraError if it is not installed.
    """
    try:
        try:
            importlib.import_module("torch_fidelity")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            _name_operators()
            importlib.import_module("torch_fidelity")
    except ImportError as error:
        raise MissingExtraError("torch-fidelity", "evaluate") from error


@cache
def _name_operators() -> torch.library.Library:
    """The operators that torchvision describes while it is imported; kept alive by the cache."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


class ClassifierJudge:
    """The shipped Fashion-MNIST classifier. Its Frechet distance is not FID."""

    extractor = "shipped classifier"

    @cached_property
    def identity(self) -> dict[str, str]:
        """Hashes of the classifier and of the statistics of real data."""
        shipped = files("cspd.demo_pair")
        names = {"extractor": "classifier", "statistics": "reference"}
        return {"name": self.extractor} | {
            f"{role}_sha256": _sha256(shipped / f"{name}.safetensors")
            for role, name in names.items()
        }

    def check(self, image_channels: int) -> None:
        """Load the classifier and the statistics."""
        load_judge()

    def score(self, pixels: np.ndarray, labels: np.ndarray, seed: int) -> Judged:
        """Accuracy, Frechet distance, precision, recall, diversity; at least 100 images."""
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        classes = torch.from_numpy(labels).long()
        features = image_features(images, classes)
        found = score_features(features, classes)
        return Judged(dict(vars(found)), redrawn_scores(features, classes, seed))


@dataclass(frozen=True)
class InceptionJudge:
    """torch-fidelity's Inception network with weights from a file, against an `.npz` of mu, sigma.

    If the `.npz` also holds `features` [M, 2048] of real images, precision and recall are measured.
    """

    weights: Path
    reference: Path

    @cached_property
    def identity(self) -> dict[str, str]:
        """Hashes of the weights and of the reference statistics; other weights make no FID."""
        digest = _sha256(self.weights)
        return {
            "name": "inception" if digest == INCEPTION_SHA256 else "inception with other weights",
            "extractor_sha256": digest,
            "statistics_sha256": _sha256(self.reference),
        }

    def check(self, image_channels: int) -> None:
        """Load torch-fidelity, the weights and the statistics."""
        if image_channels not in (1, 3):
            raise CspdError(f"images have {image_channels} channels, Inception takes 1 or 3")
        self._statistics  # noqa: B018
        self._network  # noqa: B018

    def score(self, pixels: np.ndarray, labels: np.ndarray, seed: int) -> Judged:
        """Frechet distance and Inception score by torch-fidelity's own functions."""
        check_count("the number of images", len(pixels))
        import_torch_fidelity()
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_isc import isc_features_to_metric

        features, logits = self._features(pixels)
        ours = fid_features_to_statistics(features.double())
        (frechet,) = fid_statistics_to_metric(ours, self._statistics, verbose=False).values()
        inception = isc_features_to_metric(logits)
        scores: dict[str, float | int] = {
            "n": len(pixels),
            "frechet": frechet,
            "inception_score": inception["inception_score_mean"],
            "inception_score_std": inception["inception_score_std"],
        }
        classes = torch.from_numpy(labels).long()
        reference = FeatureStats(*(torch.from_numpy(self._statistics[k]) for k in ("mu", "sigma")))
        redrawn = {"frechet": replicates(FrechetTo(reference, features), classes, seed)}
        return Judged(scores | self._neighbours(features), redrawn)

    def _features(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [N, 2048] and logits [N, 1008] of `pixels` [N, H, W, 3] uint8, or grey."""
        network, found = self._network, []
        for start in range(0, len(pixels), INCEPTION_CHUNK):
            chunk = torch.from_numpy(np.array(pixels[start : start + INCEPTION_CHUNK]))
            rgb = chunk.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
            with torch.inference_mode():
                found.append([part.cpu() for part in network(rgb)])
        features, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
        return features, logits

    @cached_property
    def _network(self) -> Any:
        import_torch_fidelity()
        from torch_fidelity.utils import create_feature_extractor

        try:
            # torch-fidelity unpickles the file without restrictions; this looks first.
            torch.load(self.weights, weights_only=True, map_location="cpu")
        except Exception as error:
            raise CspdError(
                f"{self.weights}: not a plain file of weights ({str(error).splitlines()[0]}); get "
                f"{INCEPTION_FILE} of the torch-fidelity project"
            ) from None
        try:
            return create_feature_extractor(
                "inception-v3-compat", ["2048", "logits_unbiased"], cuda=False, verbose=False,
                feature_extractor_weights_path=str(self.weights),
            )  # fmt: skip
        except RuntimeError as error:
            found = " ".join(str(error).split())
            raise CspdError(
                f"{self.weights}: not the weights of torch-fidelity's Inception network "
                f"({found:.200}); get {INCEPTION_FILE} of that project"
            ) from None

    @cached_property
    def _statistics(self) -> dict[str, np.ndarray]:
        with np.load(self.reference, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                raise CspdError(f"{self.reference}: holds {sorted(file.files)}, not mu and sigma")
            found = {name: file[name].astype(np.float64) for name in ("mu", "sigma")}
        size = found["mu"].size
        if found["mu"].shape != (size,) or found["sigma"].shape != (size, size):
            shapes = {name: list(array.shape) for name, array in found.items()}
            raise CspdError(f"{self.reference}: shapes {shapes}, expected [D] and [D, D]")
        return found

    def _neighbours(self, features: torch.Tensor) -> dict[str, float]:
        with np.load(self.reference, allow_pickle=False) as file:
            if "features" not in file.files:
                return {}
            real = torch.from_numpy(file["features"]).float()
        count = min(len(real), len(features), NEIGHBOUR_IMAGES)
        order = torch.Generator().manual_seed(0)
        real, ours = (
            part[torch.randperm(len(part), generator=order)[:count]] for part in (real, features)
        )
        precision, recall = precision_recall(real, ours.float())
        return {"precision": precision, "recall": recall}


def _sha256(path: Any) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
