"""The check for machines with a GPU: every part of it that does not need one runs here."""

import time

import pytest
import torch
from click.testing import CliRunner

from cspd.engines.backends import open_session
from cspd.engines.bundle import open_bundle
from cspd.engines.trt.options import BuildOptions
from cspd.tools.gpu import check as gpu_check
from cspd.tools.gpu.check import METHODS, Deadline, attempt, benchmark, climb, succeeded
from cspd.tools.gpu.engine_bundle import with_engines


def soon(seconds: float) -> Deadline:
    return Deadline(time.monotonic() + seconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["torch", "tensorrt", "tensorrt-rtx"])
def test_without_a_gpu_it_says_so_and_writes_nothing(tiny_bundle, tmp_path, backend):
    out = tmp_path / "check.json"
    arguments = [str(tiny_bundle.folder), "--backend", backend, "--out", str(out)]
    result = CliRunner().invoke(gpu_check.main, arguments)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {backend} cannot run on a GPU here; see cspd-run doctor\n"
    assert not out.exists()


def test_a_copy_with_real_engines(tiny_bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = BuildOptions(optimization_level=0)
    built, failures = with_engines(tiny_bundle, options, tmp_path / "copy")
    assert failures == {}
    before, after = tiny_bundle.manifest, built.manifest
    assert set(after.graphs()) == set(before.graphs())
    for label, graph in after.graphs().items():
        if not graph.spec.engines:
            assert label.endswith("speculative_loop") and graph.engines == {}
            continue
        engine = graph.engines["tensorrt-rtx"]
        assert built.file(engine.file).stat().st_size == engine.bytes
        assert graph.model_copy(update={"engines": {}}) == before.graphs()[label]
    assert set(after.files) > set(before.files)
    assert open_bundle(tiny_bundle.folder).manifest == before


def test_what_is_not_built_is_told(tiny_bundle, tmp_path):
    options = BuildOptions(flavour="tensorrt")
    built, failures = with_engines(tiny_bundle, options, tmp_path / "a", lambda: False)
    assert set(failures.values()) == {"no time left to build it"}
    graphs = tiny_bundle.manifest.graphs().items()
    assert set(failures) == {label for label, graph in graphs if graph.spec.engines}
    assert built.manifest == tiny_bundle.manifest


def test_benchmark_of_every_method(tiny_bundle):
    found = benchmark(tiny_bundle, "onnxruntime", "cpu", soon(300))
    assert found["ok"] and set(found["methods"]) == set(METHODS)
    for method, measured in found["methods"].items():
        assert measured["seconds"] > 0
        assert (measured["acceptance_rate"] is not None) == (method == "cspd")
    late = benchmark(tiny_bundle, "onnxruntime", "cpu", soon(1))
    assert not late["ok"] and set(late["methods"].values()) == {"no time left"}


def test_engines_with_tables_are_also_timed_without(hoisted_bundle, monkeypatch):
    """ONNX Runtime stands in for the engines."""

    def by_onnxruntime(bundle, label, backend, **options):
        return open_session(bundle, label, "onnxruntime", threads=1)

    monkeypatch.setattr(gpu_check, "METHODS", ("target", "lossless"))
    found = benchmark(hoisted_bundle, "tensorrt-rtx", "cpu", soon(300), by_onnxruntime)["methods"]
    steps = {"target": "denoiser", "lossless": "speculative_round"}
    for method, graph in steps.items():
        for name, other in (
            (method, f"{graph}_hoisted"),
            (f"{method}, no table of modulations", graph),
        ):
            ran = {label for label, stats in found[name]["graphs"].items() if stats["calls"]}
            assert {f"target/{g}" for g in (graph, f"{graph}_hoisted")} & ran == {f"target/{other}"}


def test_the_ladder_is_climbed_as_far_as_time_allows(tiny_bundle):
    found = climb(tiny_bundle, "onnxruntime", soon(600))
    assert found["ok"] and found["not_climbed"] == []
    assert {row["rung"] for row in found["rows"]} == set(gpu_check.LADDER)
    late = climb(tiny_bundle, "onnxruntime", soon(1))
    assert not late["ok"] and late["not_climbed"] == list(gpu_check.LADDER)


def test_a_backend_that_cannot_run_is_no_success(tiny_bundle):
    """Nothing compared is not the same as nothing wrong."""
    found = climb(tiny_bundle, "tensorrt", soon(600))
    assert not found["ok"]
    assert found["skipped"]


def test_one_failure_fails_the_check():
    good = {"tests": {"ok": True}, "benchmark": {"ok": True}, "ladder": {"ok": True}}
    good |= {"not_built": {}, "graphs": {"decoder": {"ok": True}}}
    assert succeeded(good)
    for part in ("tests", "benchmark", "ladder"):
        assert not succeeded({**good, part: {"ok": False}})
    assert not succeeded({**good, "graphs": {"decoder": {"ok": False}}})
    assert not succeeded({**good, "not_built": {"decoder": "no time left to build it"}})

    def broken() -> dict:
        raise RuntimeError("CUDA error")

    assert attempt(broken) == {"ok": False, "error": "CUDA error"}
