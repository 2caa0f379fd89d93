"""What would stop a run is said before anything is opened or written."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from cspd.runtime.cli import main
from cspd.runtime.preflight import SETTINGS_BYTES


@pytest.fixture
def dry_run(tiny_bundle, tmp_path):
    def call(*options):
        out = tmp_path / "out"
        arguments = ["generate", str(tiny_bundle.folder), "--out", str(out), "--dry-run", *options]
        result = CliRunner().invoke(main, arguments)
        assert list(tmp_path.iterdir()) == []
        return result

    return call


def test_plan_of_a_run(dry_run, tiny_bundle):
    options = ("--method", "target", "--num-images", "20", "--batch-size", "8", "--num-iter", "4")
    plan = json.loads(dry_run(*options, "--json").stdout)
    assert plan["models"] == [f"target {tiny_bundle.manifest.models['target'].preset}"]
    assert {"target/backbone", "decoder"} <= set(plan["graphs"])
    assert not any(label.startswith("draft/") for label in plan["graphs"])
    assert (plan["images"], plan["batches"], plan["autoregressive_steps"]) == (20, 3, 4)
    # Images of 16 x 16 in one channel, at most stored as they are.
    assert plan["estimated_disk_bytes"] == 20 * (16 * 16 + SETTINGS_BYTES)
    weights = tiny_bundle.folder / "target" / "weights.safetensors"
    assert plan["estimated_memory_bytes"] == weights.stat().st_size
    assert plan["problems"] == [] == plan["made"]
    text = dry_run(*options).stdout
    assert "20 images in 3 batches, 4 autoregressive steps" in text and "estimated: 65 kB" in text


def test_shards_take_what_waits_for_them_too(dry_run):
    options = ("--num-images", "20", "--format", "webdataset", "--shard-size", "8", "--json")
    assert json.loads(dry_run(*options).stdout)["estimated_disk_bytes"] == 28 * (
        16 * 16 + SETTINGS_BYTES
    )


@pytest.mark.parametrize("place", ["free_disk", "available_memory"])
def test_too_little_room(dry_run, monkeypatch, place):
    monkeypatch.setattr(f"cspd.runtime.preflight.{place}", lambda *out: 1000)
    result = dry_run()
    assert result.exit_code == 1 and "problem: " in result.stdout
    assert "1 kB" in result.stderr and result.stderr.startswith("Error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_every_problem_is_listed(dry_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = dry_run("--format", "parquet", "--device", "cuda", "--json")
    problems = json.loads(result.stdout)["problems"]
    wanted = ("cspd[parquet]", "--device cuda", "cspd[cpu]")
    assert [word in text for word, text in zip(wanted, problems, strict=True)] == [True] * 3
    assert result.exit_code == 1
