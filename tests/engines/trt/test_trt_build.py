"""Real engines, built by tensorrt-rtx without a GPU."""

import hashlib
import io
import re
import resource
import sys

import pytest
import torch
from onnx import helper
from rich.console import Console
from rich.progress import Progress
from tiny_graphs import GetGraph, narrowed, write_onnx, xy_spec

from cspd.engines.build_report import profile_shapes
from cspd.engines.errors import CspdError, MissingExtraError
from cspd.engines.trt.api import import_trt, last_words, supported_capabilities
from cspd.engines.trt.build import build_engine
from cspd.engines.trt.options import BuildOptions
from cspd.engines.trt.progress import rich_progress

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
GRAPHS = ("backbone", "denoiser", "denoiser_loop", "decoder")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_builds_in_every_precision(graph: GetGraph, tmp_path, name, precision):
    tiny, out = graph(name, precision), tmp_path / "graph.engine"
    report = build_engine(tiny.path, tiny.spec, BuildOptions(), out)
    content = out.read_bytes()
    assert report.bytes == len(content)
    assert report.sha256 == hashlib.sha256(content).hexdigest()
    assert report.version == trt.__version__
    assert report.profile == profile_shapes(tiny.spec)
    assert report.peak_memory_bytes > report.bytes
    assert [path.name for path in tmp_path.iterdir()] == ["graph.engine"]


@pytest.mark.parametrize("name", ["backbone", "denoiser"])
def test_builds_for_one_explicit_gpu(graph: GetGraph, tmp_path, name):
    tiny, out = graph(name, "fp16"), tmp_path / "graph.engine"
    options = BuildOptions(compute_capabilities=("8.9",))
    report = build_engine(tiny.path, tiny.spec, options, out)
    assert report.compute_capabilities == ("8.9",)


@pytest.mark.parametrize(
    "axes",
    [
        {"batch": (1, 1, 1), "visible": (0, 0, 16), "positions": (1, 1, 1)},
        {"batch": (2, 3, 5), "visible": (16, 16, 16), "positions": (16, 16, 16)},
    ],
    ids=["one image", "odd batch, all visible"],
)
def test_builds_for_other_profiles(graph: GetGraph, tmp_path, axes):
    tiny = graph("backbone", "fp32")
    spec = narrowed(tiny.spec, **axes)
    report = build_engine(tiny.path, spec, BuildOptions(), tmp_path / "graph.engine")
    low, _, high = report.profile["visible"]
    assert low == (axes["batch"][0], axes["visible"][0])
    assert high == (axes["batch"][2], axes["visible"][2])


def test_builder_gives_its_reason_when_it_builds_nothing(graph: GetGraph, tmp_path):
    # The library itself: Turing has no fp32 matrix product in tensorrt-rtx.
    tiny, out = graph("denoiser", "fp32"), tmp_path / "graph.engine"
    out.write_bytes(b"old engine")
    options = BuildOptions(compute_capabilities=("7.5",))
    with pytest.raises(CspdError, match="denoiser: TensorRT built no engine") as error:
        build_engine(tiny.path, tiny.spec, options, out)
    assert "Turing" in str(error.value)
    assert "cudaError" not in str(error.value)
    assert out.read_bytes() == b"old engine"
    assert len(list(tmp_path.iterdir())) == 1


def test_parser_names_the_broken_node(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=10, name="to_half"),
        helper.make_node("Add", ["x", "half"], ["y"], name="mixed_types"),
    ]
    path = write_onnx(tmp_path / "broken.onnx", nodes)
    with pytest.raises(CspdError) as error:
        build_engine(path, xy_spec(), BuildOptions(), tmp_path / "graph.engine")
    assert "broken.onnx: TensorRT cannot parse it" in str(error.value)
    assert "node mixed_types (Add)" in str(error.value)
    assert "must have same input types" in str(error.value)
    assert not (tmp_path / "graph.engine").exists()


def test_an_onnx_file_of_another_graph_is_refused(graph: GetGraph, tmp_path):
    path, spec = graph("decoder", "fp32").path, graph("backbone", "fp32").spec
    with pytest.raises(CspdError, match=r"backbone: .* inputs \['latents'\], expected"):
        build_engine(path, spec, BuildOptions(), tmp_path / "graph.engine")


def test_a_missing_onnx_file_is_named(tmp_path):
    with pytest.raises(CspdError, match=r"no\.onnx does not exist"):
        build_engine(tmp_path / "no.onnx", xy_spec(), BuildOptions(), tmp_path / "graph.engine")


def test_progress_rises_to_the_end(graph: GetGraph, tmp_path):
    tiny = graph("decoder", "fp32")
    seen = []
    build_engine(
        tiny.path, tiny.spec, BuildOptions(), tmp_path / "graph.engine",
        lambda fraction, phase: seen.append((fraction, phase)),
    )  # fmt: skip
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.5 < fractions[-1] <= 1
    assert "Building engine" in {phase for _, phase in seen}


def test_interrupt_in_the_callback_stops_the_build(graph: GetGraph, tmp_path):
    tiny, calls = graph("backbone", "fp32"), []

    def interrupt(fraction: float, phase: str) -> None:
        calls.append(phase)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny.path, tiny.spec, BuildOptions(), tmp_path / "graph.engine", interrupt)
    assert len(calls) == 5
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(graph: GetGraph, tmp_path):
    tiny = graph("decoder", "fp32")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CspdError, match=r"graph\.engine: cannot be written \(File too large\)"):
            build_engine(tiny.path, tiny.spec, BuildOptions(), tmp_path / "graph.engine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_rich_bar_shows_the_name_and_ends_full():
    screen = io.StringIO()
    bars = Progress(console=Console(file=screen, force_terminal=True, width=80))
    with bars, rich_progress("mar-h backbone", bars) as callback:
        callback(0.25, "Optimizing graph")
    assert "mar-h backbone" in screen.getvalue()
    assert bars.tasks[0].completed == 1.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"flavour": "trt"}, "--backend: got 'trt'"),
        ({"optimization_level": 6}, "--opt-level: got 6, expected 0..5"),
        ({"workspace_bytes": 5}, "--workspace: got 5 bytes"),
        (
            {"compute_capabilities": ("sm89",)},
            "--compute-capability: got 'sm89', expected e.g. 8.9",
        ),
        (
            {"flavour": "tensorrt", "compute_capabilities": ("9.0",)},
            "--compute-capability: tensorrt",
        ),
        ({"version_compatible": True}, "--version-compatible: not for tensorrt-rtx"),
        ({"hardware_compatible": True}, "--hardware-compatible: not for tensorrt-rtx"),
    ],
)
def test_options_are_refused_in_the_words_of_the_command_line(values, words):
    with pytest.raises(CspdError, match="^" + re.escape(words)):
        BuildOptions(**values)


def test_timing_cache_is_refused_for_rtx(tmp_path):
    with pytest.raises(CspdError, match="--timing-cache: not for tensorrt-rtx"):
        BuildOptions(timing_cache=tmp_path / "timing.cache")
    BuildOptions(flavour="tensorrt", timing_cache=tmp_path / "timing.cache")


def test_unknown_capability_lists_the_known_ones(graph: GetGraph, tmp_path):
    tiny = graph("decoder", "fp32")
    options = BuildOptions(compute_capabilities=("9.0",))
    with pytest.raises(CspdError, match=r"got \['9.0'\], expected some of .*'8.9'"):
        build_engine(tiny.path, tiny.spec, options, tmp_path / "graph.engine")


def test_levels_and_workspace_are_accepted_by_the_builder(graph: GetGraph, tmp_path):
    tiny = graph("decoder", "fp32")
    options = BuildOptions(optimization_level=0, workspace_bytes=64 << 20)
    assert build_engine(tiny.path, tiny.spec, options, tmp_path / "graph.engine").bytes > 0


def test_capabilities_are_numbers():
    found = supported_capabilities(trt)
    assert {"7.5", "8.9", "12.0"} <= set(found)
    assert found["12.0"] == trt.ComputeCapability.SM120
    assert supported_capabilities(torch) == {}


def test_missing_flavour_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cspd\[gpu\]'"):
        import_trt("tensorrt")
    with pytest.raises(CspdError, match="expected one of"):
        import_trt("trt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tensorrt_without_a_gpu_says_what_to_do(monkeypatch, graph: GetGraph, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    tiny = graph("decoder", "fp32")
    with pytest.raises(CspdError, match="torch sees none"):
        build_engine(
            tiny.path, tiny.spec, BuildOptions(flavour="tensorrt"), tmp_path / "graph.engine"
        )


def test_last_words_drop_repeats_and_the_missing_driver():
    messages = ["a", "[x] cudaError 35: no driver", "b\n b", "a"]
    assert last_words(messages) == "  a\n  b"
    assert last_words(["cudaError 35"]) == "  (TensorRT gave no reason)"
    assert last_words("abcdef", limit=2) == "  e\n  f"


@pytest.mark.gpu
def test_tensorrt_builds_on_the_gpu(graph: GetGraph, tmp_path):
    pytest.importorskip("tensorrt", reason="tensorrt is not installed")
    tiny, cache = graph("backbone", "fp16"), tmp_path / "timing.cache"
    options = BuildOptions(flavour="tensorrt", timing_cache=cache)
    report = build_engine(tiny.path, tiny.spec, options, tmp_path / "graph.engine")
    assert report.gpu == torch.cuda.get_device_name()
    assert cache.stat().st_size > 0
