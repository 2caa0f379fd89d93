"""The two-sample tool: uniform where nothing differs, small where something does. Level 1e-3."""

import pytest
import torch
from scipy import stats

from cspd.engines.errors import CspdError
from cspd.tools import twosample
from cspd.tools.twosample import ImageSet, compare, energy_test, equal_shares

LEVEL = 1e-3


def images(seed, shift=0.0, count=200, accuracy=0.9):
    """Features whose mean is the class; `shift` moves the first of 64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    features = labels[:, None] + torch.randn(count, 64, generator=generator)
    features[:, 0] += shift
    return ImageSet(features, labels, torch.rand(count, generator=generator) < accuracy)


def test_equal_laws_pass_and_a_shift_is_seen(monkeypatch):
    monkeypatch.setattr(twosample, "PERMUTATIONS", 199)
    values = [energy_test(images(2 * k), images(2 * k + 1), k) for k in range(12)]
    # Each is uniform on 1/200, ..., 1: that all 12 are below 1/2 has probability 2^-12 < LEVEL.
    assert max(values) > 0.5 and min(values) > LEVEL / 12
    assert energy_test(images(1), images(2, shift=1.0)) == 1 / 200


def test_a_difference_between_classes_does_not_hide_one_within():
    """Permuting across classes would drown a shift in their distance; within them it is seen."""
    far = [images(seed, shift, 400) for seed, shift in ((5, 0.0), (6, 0.8))]
    for one in far:
        one.features[:, 1] += 100 * one.labels
    assert energy_test(*far) < 0.01


def test_shares():
    ones = torch.ones(1000, dtype=torch.bool)
    some = torch.arange(1000) < 950
    assert equal_shares(ones, ones) == 1.0
    error = (0.94 * 0.06 * 2 / 1000) ** 0.5
    expected = 2 * stats.norm.sf(0.02 / error)
    assert equal_shares(some, torch.arange(1000) < 930) == pytest.approx(expected, abs=1e-6)
    assert equal_shares(some, torch.arange(1000) < 850) < LEVEL


def test_sides_need_the_same_classes():
    with pytest.raises(CspdError, match="different numbers of images"):
        compare([images(1)], [images(2, count=210), images(3, count=10)])
