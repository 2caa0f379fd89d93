"""The two-sample tool: uniform where nothing differs, small where something does. Level 1e-3."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from cspd.engines.errors import CspdError
from cspd.runtime.store.images import write_png
from cspd.tools.judge import twosample
from cspd.tools.judge.run import IMAGES
from cspd.tools.judge.twosample import ImageSet, compare, energy_test, equal_shares

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


def stored(folder, seed, labels):
    """A set as `evaluate` leaves it: black images of `labels`, the settings in the first."""
    folder.mkdir()
    lines = [json.dumps({"image": k, "label": label}) for k, label in enumerate(labels)]
    (folder / IMAGES).write_text("\n".join(lines) + "\n")
    write_png(folder / "00000.png", np.zeros((28, 28, 1), np.uint8), {"config": {"seed": seed}})
    return folder


def test_sets_that_are_no_independent_samples_are_refused(tmp_path):
    labels = [k % 10 for k in range(100)]
    same = [str(stored(tmp_path / name, 3, labels)) for name in ("a", "b")]
    other = str(stored(tmp_path / "c", 4, labels))
    odd = str(stored(tmp_path / "d", 5, [0] * 100))
    few = str(stored(tmp_path / "e", 6, [0] * 40))
    cases = {
        ("--first", same[0], "--second", same[1]): "have seed 3: they start from the same noise",
        ("--first", same[0], "--first", same[1], "--second", other): "have seed 3",
        ("--first", same[0], "--second", odd): "different numbers of images of a class",
        ("--first", same[0], "--second", few): "is 40; scores need 100",
    }
    for arguments, words in cases.items():
        result = CliRunner().invoke(twosample.main, ["compare", *arguments])
        assert result.exit_code == (2 if few in arguments else 1) and words in result.stderr
