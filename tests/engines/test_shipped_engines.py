"""Real engines of every graph of the shipped pair, in both precisions, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_graphs import narrowed

from cspd.engines.bundle import open_bundle
from cspd.engines.lint import lint_model, refuse_errors
from cspd.engines.spec import GraphSpec
from cspd.engines.trt_build import build_engine
from cspd.engines.trt_options import BuildOptions, profile_shapes
from cspd.export.assemble import assemble_mar
from cspd.export.networks import EXACT, HOISTED, HOISTED_ROUND, MODULATION, model_graphs
from cspd.export.onnx_export import export_graph, save_graph
from cspd.export.presets import MarConfig
from cspd.runtime.cli import shipped_bundle

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
BUNDLE = open_bundle(shipped_bundle())
ROLES = ("target", "draft")
REDUCED = ("backbone", "denoiser")
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
    return model, model_graphs(model, *limits, precision, exact.diffloss, hoisted=True)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> dict[str, Exported]:
    """The graphs that an fp16 bundle of the shipped pair has and the shipped one has not."""
    found = {}
    for role in ROLES:
        folder = tmp_path_factory.mktemp(role)
        model, graphs = graphs_of(role, "fp16")
        save_file(model.state_dict(), folder / "weights.safetensors")
        for name in REDUCED:
            module, spec = graphs[name]
            path = folder / f"{name}.onnx"
            save_graph(export_graph(module, spec), path, folder / "weights.safetensors")
            found[f"{role}/{name}"] = Exported(path, spec)
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
    labels = [f"{role}/{name}" for role in ROLES for name in REDUCED]
    return {n: check_engine(BUNDLE.graph_file(n), BUNDLE.graph(n).spec, out) for n in labels}


@pytest.mark.parametrize(
    "label", [n for n in BUNDLE.manifest.graphs() if n.partition("/")[2] not in REDUCED]
)
def test_every_other_shipped_graph_builds(label, tmp_path):
    check_engine(BUNDLE.graph_file(label), BUNDLE.graph(label).spec, tmp_path / "engine")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", REDUCED)
def test_transformer_and_head_build_in_both_precisions(half, single, role, name, tmp_path):
    label = f"{role}/{name}"
    size = check_engine(half[label].path, half[label].spec, tmp_path / "engine")
    weights = sum(tensor.numel() for tensor in matrices(role, name))
    # Two bytes less for every weight of a product; kernels differ by less than one.
    assert single[label] - size > weights
    assert profile_shapes(half[label].spec) == profile_shapes(BUNDLE.graph(label).spec)


def matrices(role: str, name: str) -> list[torch.Tensor]:
    """The weights of the products of one graph."""
    _, graphs = graphs_of(role, "fp16")
    head = {id(p) for p in graphs["denoiser"][0].parameters()}
    parameters = [p for p in graphs[name][0].parameters() if p.dtype == torch.float16]
    return [p for p in parameters if name == "denoiser" or id(p) not in head]


@pytest.mark.parametrize("name", [MODULATION, HOISTED, HOISTED_ROUND])
def test_hoisted_graphs_of_an_fp16_bundle_build(name, tmp_path):
    """No shipped bundle has them: a bundle has them if it was built with engines."""
    module, spec = graphs_of("target", "fp16")[1][name]
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    path = tmp_path / f"{name}.onnx"
    save_graph(export_graph(module, spec), path, tmp_path / "weights.safetensors")
    check_engine(path, spec, tmp_path / "engine")


@pytest.mark.parametrize("role", ROLES)
def test_the_other_graphs_of_an_fp16_bundle_are_the_shipped_ones(role):
    """They compute in float32: first step and speculative round are built above already."""
    _, graphs = graphs_of(role, "fp16")
    assert set(graphs) == {*REDUCED, *EXACT, HOISTED}
    for name in EXACT:
        assert {p.dtype for p in graphs[name][0].parameters()} == {torch.float32}
    twins = {"denoiser_first": "denoiser", "speculative_round": "speculative_round"}
    for name, twin in twins.items():
        _, spec = graphs[name]
        shipped = BUNDLE.graph(f"{role}/{twin}").spec
        assert spec.model_copy(update={"name": shipped.name}) == shipped


@pytest.mark.parametrize("name", REDUCED)
def test_other_profiles_build(half, name, tmp_path):
    exported = half[f"draft/{name}"]
    check_engine(exported.path, narrowed(exported.spec, **ONE_IMAGE[name]), tmp_path / "engine")
