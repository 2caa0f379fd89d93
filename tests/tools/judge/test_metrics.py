from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cspd.engines.errors import CspdError
from cspd.tools.judge import metrics
from cspd.tools.judge.metrics import (
    FeatureStats,
    class_distances,
    diversity,
    feature_stats,
    frechet_distance,
    interleaved,
    load_judge,
    load_reference,
    precision_recall,
    score_images,
)

SAMPLE = Path(__file__).parents[2] / "helpers" / "fashion_sample.safetensors"
SHIPPED = Path(metrics.__file__).parents[2] / "demo_pair"


def gaussian(seed: int, size: int = 6, rank: int | None = None) -> FeatureStats:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank or size, generator=generator, dtype=torch.float64)
    mean = torch.randn(size, generator=generator, dtype=torch.float64)
    return FeatureStats(mean, factor @ factor.T)


def scipy_frechet(first: FeatureStats, second: FeatureStats) -> float:
    cross = scipy.linalg.sqrtm(first.cov.numpy() @ second.cov.numpy()).real
    shift = np.square(first.mean.numpy() - second.mean.numpy()).sum()
    return shift + np.trace(first.cov.numpy() + second.cov.numpy() - 2 * cross)


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_file(SAMPLE)
    return found["images"].float() / 127.5 - 1, found["labels"].long()


def test_frechet_of_one_dimensional_gaussians():
    # N(1, 4) and N(4, 25): (1 - 4)^2 + (2 - 5)^2.
    first, second = (
        FeatureStats(torch.tensor([m]).double(), torch.tensor([[v]]).double())
        for m, v in ((1, 4), (4, 25))
    )
    assert frechet_distance(first, second) == pytest.approx(18)


def test_frechet_of_commuting_covariances():
    rotation = torch.linalg.qr(gaussian(0).cov).Q
    a, b = (
        torch.tensor([1.0, 4, 9, 16, 25, 0]).double(),
        torch.tensor([4.0, 4, 1, 0, 9, 36]).double(),
    )
    zero = torch.zeros(6, dtype=torch.float64)
    first, second = (FeatureStats(zero, rotation @ v.diag() @ rotation.T) for v in (a, b))
    # Sum of squared differences of the standard deviations: 1 + 0 + 4 + 16 + 4 + 36.
    assert frechet_distance(first, second) == pytest.approx(61)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_frechet_against_scipy(seed, other):
    first, second = gaussian(seed), gaussian(other + 10_001)
    expected = scipy_frechet(first, second)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_equal_and_of_singular_gaussians():
    assert frechet_distance(gaussian(0), gaussian(0)) == pytest.approx(0, abs=1e-10)
    singular = gaussian(1, rank=2)
    assert frechet_distance(singular, singular) == pytest.approx(0, abs=1e-6)
    moved = FeatureStats(singular.mean + 2, singular.cov)
    assert frechet_distance(singular, moved) == pytest.approx(6 * 4)


def test_statistics_are_those_of_numpy():
    features = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    stats = feature_stats(features)
    assert stats.mean.dtype == torch.float64
    np.testing.assert_allclose(stats.mean, features.double().mean(0))
    np.testing.assert_allclose(stats.cov, np.cov(features.double().numpy(), rowvar=False))


def test_precision_recall_on_a_line():
    real = torch.tensor([[0.0], [1], [2], [3]])
    # Radii of the real points with one neighbour are 1; of the samples 0.5, 0.5, 7.
    samples = torch.tensor([[2.5], [3.0], [10.0]])
    precision, recall = precision_recall(real, samples, neighbours=1)
    assert precision == pytest.approx(2 / 3)
    # 10 reaches down to 3, 2.5 and 3 reach 2..3.5: the real points 2 and 3 are covered.
    assert recall == pytest.approx(1 / 2)


def test_precision_recall_of_equal_distant_and_collapsed_sets():
    real = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(real, real.clone()) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    collapsed = real[:1] + 1e-3 * real
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1.0 and recall < 0.05


def test_class_distance_by_hand():
    features = torch.tensor([[0.0, 0], [3, 4], [6, 8], [1, 1]])
    distances = class_distances(features, torch.tensor([2, 2, 2, 5]))
    # Pairs of class 2 are 5, 5 and 10 apart; class 5 has one member.
    assert distances[2] == pytest.approx(20 / 3)
    assert distances.isnan().sum() == 9


def test_diversity_is_a_ratio_to_real_data():
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    real = class_distances(features, labels)
    torch.testing.assert_close(diversity(features, labels, real), torch.ones(3).double())
    shrunk = torch.where(labels[:, None] == 1, 0.25 * features, features)
    torch.testing.assert_close(diversity(shrunk, labels, real), torch.tensor([1, 0.25, 1]).double())
    same = features[labels]
    torch.testing.assert_close(diversity(same, labels, real), torch.zeros(3).double())


def test_interleaved_rows():
    labels = torch.arange(100).flip(0) // 10
    rows = interleaved(labels, 2)
    assert labels[rows].tolist() == 2 * list(range(10))
    assert len(set(rows.tolist())) == 20


def test_reference_is_that_of_the_shipped_classifier():
    _, reference = load_judge()
    assert reference.accuracy >= 0.91
    assert reference.features.shape == (2000, 128)
    for stats in (reference.train, reference.test):
        assert stats.mean.shape == (128,) and stats.cov.shape == (128, 128)
        assert torch.linalg.eigvalsh(stats.cov).min() > -1e-9
    kept = feature_stats(reference.features)
    floor = frechet_distance(reference.train, reference.test)
    # A fifth of the test half lies close to it, and the halves close to each other, on a scale
    # where the classes are hundreds apart.
    assert frechet_distance(kept, reference.test) < 1
    assert 0 < floor < 1


def test_real_images_score_as_real(real):
    score = score_images(*real)
    assert score.n == 200
    assert score.accuracy >= 0.86
    # The very images of the reference's first rows, up to its storage in half precision.
    assert score.frechet == pytest.approx(score.frechet_floor, rel=1e-2)
    assert score.precision == score.recall == 1.0
    assert 0.85 < score.diversity < 1.05


@pytest.mark.parametrize("defect", ["noise", "collapse", "wrong labels"])
def test_defects_show(real, defect):
    images, labels = real
    good = score_images(images, labels)
    if defect == "noise":
        generator = torch.Generator().manual_seed(0)
        images = (images + 0.5 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
        bad = score_images(images, labels)
        assert bad.accuracy < good.accuracy - 0.2
        assert bad.frechet > 10 * good.frechet
    elif defect == "collapse":
        bad = score_images(images[:10].repeat(20, 1, 1, 1), labels)
        assert bad.diversity == pytest.approx(0, abs=1e-3)
        assert bad.recall < 0.2 < bad.precision
    else:
        bad = score_images(images, (labels + 1) % 10)
        assert bad.accuracy < 0.1
        assert bad.frechet == good.frechet


def test_score_does_not_depend_on_the_order(real):
    images, labels = real
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    first, second = (asdict(score_images(images[i], labels[i])) for i in (slice(None), order))
    assert first == pytest.approx(second, rel=1e-4)


def test_bad_input_is_refused(real):
    images, labels = real
    broken = images.clone()
    broken[3, 0, 1, 1] = float("nan")
    for arguments, message in (
        ((images[:99], labels[:99]), "100 images or more, got 99"),
        ((images, labels[:50]), "labels are"),
        ((images, labels + 5), "0..9"),
        ((broken, labels), "NaN"),
        ((images * 2, labels), "beyond"),
        ((images.repeat(1, 3, 1, 1), labels), "expected"),
    ):
        with pytest.raises(CspdError, match=message):
            score_images(*arguments)


def test_reference_of_another_classifier_is_refused(tmp_path):
    with pytest.raises(CspdError, match="made with another classifier"):
        load_reference(SHIPPED / "reference.safetensors", "0" * 64)
    save_file({"a": torch.zeros(1)}, tmp_path / "r")
    with pytest.raises(CspdError, match="made with another classifier"):
        load_reference(tmp_path / "r", "0" * 64)
    with pytest.raises(CspdError, match="no reference of real data"):
        load_reference(tmp_path / "missing", "0" * 64)
