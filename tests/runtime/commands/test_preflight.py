"""What would stop a run is said before anything is opened or written."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from cspd.engines.console.commands import human_seconds
from cspd.runtime.commands.cli import main
from cspd.runtime.commands.preflight import COMPRESSED, SETTINGS_BYTES


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
    # Images of 16 x 16 in one channel.
    assert plan["estimated_disk_bytes"] == 20 * (int(COMPRESSED * 256) + SETTINGS_BYTES)
    weights = tiny_bundle.folder / "target" / "weights.safetensors"
    assert plan["estimated_memory_bytes"] == weights.stat().st_size
    assert plan["problems"] == [] == plan["made"]
    shown = dry_run(*options).stdout
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(shown.split())
    assert "20 images in 3 batches, 4 autoregressive steps" in text and "estimated: 33 kB" in text
    seconds = plan["estimated_seconds"]
    assert seconds > 0 and f"{human_seconds(seconds)} within a factor of two" in text
    more = json.loads(dry_run(*options, "--num-images", "40", "--json").stdout)
    # The last of three batches is padded to 8, five batches are full.
    assert more["estimated_seconds"] == pytest.approx(40 / 24 * seconds)


def test_a_batch_that_would_be_nearly_all_padding(dry_run):
    """4 images in batches of 4,096 take a thousand times their own work."""
    few = ("--num-images", "4", "--batch-size", "4096")
    (problem,) = json.loads(dry_run(*few, "--json").stdout)["problems"]
    assert "--batch-size is 4096, but the run makes 4" in problem
    assert "4,096 images would be computed" in problem
    assert "use --batch-size 4 or --no-reproducible" in problem
    for fine in (("--num-images", "4", "--batch-size", "64"), (*few, "--no-reproducible")):
        assert json.loads(dry_run(*fine, "--json").stdout)["problems"] == []
    filled = ("--num-images", "256", "--batch-size", "4096")
    assert json.loads(dry_run(*filled, "--json").stdout)["problems"] == []


def test_what_is_there_needs_no_room(tiny_bundle, tmp_path, monkeypatch):
    """A disk that is full of the images of a run lets it be looked at again."""
    out = tmp_path / "out"
    command = ["generate", str(tiny_bundle.folder), "--out", str(out), "--num-images", "2"]
    command += ["--num-iter", "2", "--head-steps", "2", "--threads", "1"]
    assert CliRunner().invoke(main, command).exit_code == 0
    monkeypatch.setattr("cspd.runtime.commands.preflight.free_disk", lambda out: 0)
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0 and "2 images in" in again.stdout
    assert CliRunner().invoke(main, [*command, "--num-images", "3"]).exit_code == 1


@pytest.mark.parametrize(
    "place", ["runtime.commands.preflight.free_disk", "engines.console.preflight.available_memory"]
)
def test_too_little_room(dry_run, monkeypatch, place):
    monkeypatch.setattr(f"cspd.{place}", lambda *out: 1000)
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
