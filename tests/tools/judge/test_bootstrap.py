"""Intervals: the bootstrap's spread against spreads that are known or drawn afresh."""

import pytest
import torch

from cspd.tools.judge.bootstrap import REPLICATES, interval, redraw, replicates
from cspd.tools.judge.metrics import FeatureStats, FrechetTo, feature_stats, frechet_distance

# A standard deviation of k values is known to 1 in sqrt(2 k); five of that.
WITHIN = 5 / (2 * REPLICATES) ** 0.5


def test_sets_are_redrawn_within_classes_and_alike_for_one_seed():
    labels = torch.tensor([0, 2, 2, 0, 2, 5, 5])
    rows = list(redraw(labels, 3))
    assert len(rows) == REPLICATES
    for chosen in rows:
        assert labels[chosen].bincount().tolist() == labels.bincount().tolist()
    assert set(torch.cat(rows).tolist()) == set(range(7))
    assert all(map(torch.equal, rows, redraw(labels, 3)))
    assert not all(map(torch.equal, rows, redraw(labels, 4)))


@pytest.mark.parametrize("per_class", [2, 20])
def test_a_share_has_the_spread_of_its_classes(per_class):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(400) % (400 // per_class)
    right = (torch.rand(400, generator=generator) < 0.8).double()
    found = replicates(lambda rows: right[rows].mean().item(), labels, 0)
    # An unbiased estimate of the variance within each class, summed.
    variance = sum(right[labels == c].var().item() * per_class for c in labels.unique()) / 400**2
    assert found.std().item() == pytest.approx(variance**0.5, rel=WITHIN)


def test_classes_of_one_image_are_drawn_together():
    found = replicates(lambda rows: rows.double().mean().item(), torch.arange(100), 0)
    expected = torch.arange(100.0).std().item() / 10
    assert found.std().item() == pytest.approx(expected, rel=WITHIN)


def test_what_pairs_share_cancels():
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(300) % 10
    shared, own = torch.randn(2, 300, generator=generator, dtype=torch.float64)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return replicates(lambda rows: values[rows].mean().item(), labels, 0)

    difference = spread(shared + 0.1 * own) - spread(shared)
    assert difference.std().item() == pytest.approx(0.1 / 300**0.5, rel=WITHIN + 0.1)


@pytest.mark.parametrize("count", [5, 12, 300])
def test_the_quick_distance_is_the_distance(count):
    generator = torch.Generator().manual_seed(3)
    real, images = (torch.randn(k, 12, generator=generator).double() for k in (40, count))
    reference = feature_stats(real)
    quick = FrechetTo(reference, images)
    assert quick(torch.arange(count)) == pytest.approx(
        frechet_distance(feature_stats(images), reference), rel=1e-6
    )


def test_the_interval_of_a_distance_is_the_spread_of_fresh_sets():
    generator = torch.Generator().manual_seed(4)
    size = 6
    reference = FeatureStats(torch.zeros(size).double(), torch.eye(size).double())

    def draw() -> torch.Tensor:
        return 0.4 + 1.2 * torch.randn(200, size, generator=generator, dtype=torch.float64)

    fresh = [frechet_distance(feature_stats(draw()), reference) for _ in range(REPLICATES)]
    one = draw()
    labels = torch.zeros(200, dtype=torch.long)
    found = replicates(FrechetTo(reference, one), labels, 0)
    expected = torch.tensor(fresh).std().item()
    assert found.std().item() == pytest.approx(expected, rel=2 * WITHIN)
    low, high = interval(2.0, found)
    assert high - 2.0 == pytest.approx(1.96 * found.std().item()) and high + low == 4.0
