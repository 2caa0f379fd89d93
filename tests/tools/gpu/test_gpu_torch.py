"""What `gpu_check` measures with PyTorch alone, on the CPU with a stand-in for CUDA graphs."""

import numpy as np
import pytest
from fake_gpu import FakeGraphs

from cspd.export.mar.presets import PRESETS, MarConfig
from cspd.tools.gpu import with_torch as gpu_torch
from cspd.tools.gpu.with_torch import Synthetic, check

TINY = MarConfig(16, 32, 2, 2, 2, head_width=32, head_depth=2)


@pytest.fixture
def synthetic(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(gpu_torch, "AR_STEPS", 2)
    monkeypatch.setattr(gpu_torch, "EAGER_STEPS", 1)
    presets = {"target": "tiny", "draft": "tiny"}
    return Synthetic(
        presets, "bf16", np.full(100, 0.9), compiled=False, device="cpu", graphs=FakeGraphs()
    )


def test_every_way_is_measured_and_recorded(synthetic):
    found = synthetic.measure("target", 2, repeats=2)
    assert set(found["ways"]) == {"eager", "captured", "lossless"}
    assert all(way["ms_per_step"] > 0 for way in found["ways"].values())
    assert found["notes"] == []
    replayed = {name for name, stats in found["captures"].items() if stats["replayed"]}
    expected = {"target hoisted", "target hoisted rounds", "target/backbone"}
    assert expected | {"target/denoiser_first"} == replayed


def test_the_bundle_of_a_synthetic_pair_says_so(synthetic):
    assert synthetic.bundle.manifest.synthetic
    assert synthetic.bundle.manifest.models["target"].precision == "bf16"


def test_parts_for_which_no_time_is_left_say_so(tiny_bundle):
    report = check(tiny_bundle, lambda: 1.0, lambda found: None)
    assert report["served"]["skipped"] == "1 s left, it needs 35"
    assert all("skipped" in part for part in report.values())
