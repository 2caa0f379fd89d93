"""Real engines of every graph of the shipped pair, the draft's in fp16 too, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_graphs import narrowed

from cspd.engines.build_report import profile_shapes
from cspd.engines.bundle import open_bundle
from cspd.engines.lint import lint_model, refuse_errors
from cspd.engines.spec import GraphSpec
from cspd.engines.trt.build import build_engine
from cspd.engines.trt.options import BuildOptions
from cspd.export.graphs.networks import EXACT, model_graphs
from cspd.export.mar.assemble import assemble_mar
from cspd.export.mar.presets import MarConfig
from cspd.export.onnx.trace import export_graph, save_graph
from cspd.runtime.commands.cli import shipped_bundle

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
BUNDLE = open_bundle(shipped_bundle())
ROLES = ("target", "draft")
REDUCED = ("backbone", "denoiser")
HALF = "draft"  # the model that is built in fp16 too, as are models of published sizes elsewhere
ONE_IMAGE = {
    "backbone": {"batch": (1, 2, 2), "visible": (0, 24, 49), "positions": (1, 1, 49)},
    "denoiser": {"rows": (1, 8, 49), "tokens": (1, 8, 49)},
}


@dataclass(frozen=True)
class Exported:
    """A graph as an ONNX file, with its contract."""

    path: Path
    spec: GraphSpec


def graphs_of(role: str, precision: str):
    """Modules and contracts of one shipped model in `precision`."""
    record = BUNDLE.manifest.models[role]
    state = load_file(BUNDLE.file(record.weights))
    config, limits = MarConfig(**record.config), (64, 4096)
    exact = assemble_mar(config, state, "fp32")
    model = assemble_mar(config, state, precision)
    return model, model_graphs(model, *limits, precision, exact.diffloss)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> dict[str, Exported]:
    """The graphs that an fp16 bundle of the shipped draft has and the shipped one has not."""
    found, folder = {}, tmp_path_factory.mktemp(HALF)
    model, graphs = graphs_of(HALF, "fp16")
    save_file(model.state_dict(), folder / "weights.safetensors")
    for name in REDUCED:
        module, spec = graphs[name]
        path = folder / f"{name}.onnx"
        save_graph(export_graph(module, spec), path, folder / "weights.safetensors")
        found[name] = Exported(path, spec)
    return found


def check_engine(path: Path, spec: GraphSpec, out: Path) -> int:
    """Lint as a build does, then build; returns the size of the engine."""
    refuse_errors(spec.name, lint_model(path, spec, "tensorrt-rtx"))
    report = build_engine(path, spec, BuildOptions(), out)
    assert report.bytes == out.stat().st_size > 0
    assert report.profile == profile_shapes(spec)
    return report.bytes


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, int]:
    """Bytes of the float32 engines of the graphs that have a twin in half precision."""
    out = tmp_path_factory.mktemp("single") / "engine"
    labels = [f"{HALF}/{name}" for name in REDUCED]
    return {n: check_engine(BUNDLE.graph_file(n), BUNDLE.graph(n).spec, out) for n in labels}


OTHERS = [
    label
    for label, graph in BUNDLE.manifest.graphs().items()
    if label not in {f"{HALF}/{name}" for name in REDUCED} and graph.spec.engines
]


@pytest.mark.parametrize("label", OTHERS)
def test_every_other_shipped_graph_builds(label, tmp_path):
    check_engine(BUNDLE.graph_file(label), BUNDLE.graph(label).spec, tmp_path / "engine")


@pytest.mark.parametrize("name", REDUCED)
def test_transformer_and_head_build_in_both_precisions(half, single, name, tmp_path):
    label = f"{HALF}/{name}"
    size = check_engine(half[name].path, half[name].spec, tmp_path / "engine")
    weights = sum(tensor.numel() for tensor in matrices(name))
    # Two bytes less for every weight of a product; kernels differ by less than one.
    assert single[label] - size > weights
    assert profile_shapes(half[name].spec) == profile_shapes(BUNDLE.graph(label).spec)


def matrices(name: str) -> list[torch.Tensor]:
    """The weights of the products of one graph."""
    _, graphs = graphs_of(HALF, "fp16")
    head = {id(p) for p in graphs["denoiser"][0].parameters()}
    parameters = [p for p in graphs[name][0].parameters() if p.dtype == torch.float16]
    return [p for p in parameters if name == "denoiser" or id(p) not in head]


@pytest.mark.parametrize("role", ROLES)
def test_the_other_graphs_of_an_fp16_bundle_are_the_shipped_ones(role):
    """They compute in float32: first step and speculative round are built above already."""
    _, graphs = graphs_of(role, "fp16")
    twins = {"denoiser_first": "denoiser", "speculative_round": "speculative_round"}
    assert set(graphs) == {*REDUCED, *twins} and set(twins) < set(EXACT)
    for name in twins:
        module, spec = graphs[name]
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        shipped = BUNDLE.graph(f"{role}/{twins[name]}").spec
        assert spec.model_copy(update={"name": shipped.name}) == shipped


@pytest.mark.parametrize("name", REDUCED)
def test_other_profiles_build(half, name, tmp_path):
    exported = half[name]
    check_engine(exported.path, narrowed(exported.spec, **ONE_IMAGE[name]), tmp_path / "engine")
