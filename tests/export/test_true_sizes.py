"""Every graph of the published models at its true width, through the build of a bundle.

Only depth is cut, to 1 block per side and in the head: it adds time and nothing else. Weights come
in as the authors publish them.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
import torch
from official import official_names, write_checkpoint
from onnx import TensorProto
from safetensors.torch import load_file

from cspd.engines.bundle import Bundle, open_bundle
from cspd.engines.manifest import Geometry
from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.engines.trt.options import BuildOptions as EngineOptions
from cspd.export.build import BuildOptions, BundlePlan, Source, build_bundle, no_progress
from cspd.export.build_graph import GraphBuilder
from cspd.export.graphs.networks import EXACT, model_graphs
from cspd.export.mar.assemble import assemble_mar
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import PRESETS, MarConfig
from cspd.export.pairs import imagenet_classes
from cspd.export.weights.checkpoint import load_mar
from cspd.export.weights.random import random_state

PUBLISHED = ("mar-b", "mar-l", "mar-h")
BUILT = (
    "backbone", "denoiser", "denoiser_first", "speculative_round",
    "head_modulation", "denoiser_hoisted", "speculative_round_hoisted",
)  # fmt: skip
LOOPS = ("denoiser_loop", "speculative_loop")
ENGINES = (EngineOptions(optimization_level=0),)
FREQUENCIES = 128  # of the embedding of time: the only floats that a graph keeps to itself


@dataclass(frozen=True)
class Built:
    """The bundle of one model with engines, and what its checkpoint held."""

    config: MarConfig
    averaged: dict[str, torch.Tensor]
    bundle: Bundle


@pytest.fixture(scope="module", params=PUBLISHED)
def built(request, tmp_path_factory) -> Built:
    """A bundle in fp16 with engines, built from a checkpoint of the authors' layout."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    preset, folder = request.param, tmp_path_factory.mktemp(request.param)
    config = replace(PRESETS[preset], encoder_depth=1, decoder_depth=1, head_depth=1)
    with torch.device("meta"):
        empty = Mar(config)
    averaged = random_state(empty, seed=0)
    write_checkpoint(folder, averaged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, preset, config)
        loaded = load_mar(folder / "checkpoint-last.pth", preset)
    assert loaded.warnings == ()
    source = Source(preset, loaded.state, loaded.source, loaded.sha256, loaded.config)
    plan = BundlePlan(
        models={"target": source},
        decoder=None,
        geometry=Geometry(
            grid=16, token_dim=16, num_classes=1000, image_channels=1, image_size=64
        ),
        class_names=imagenet_classes(),
        schedule=ScheduleSpec(),
        options=BuildOptions(precision="fp16", engines=ENGINES),
        defaults={"cfg": 3.0},
    )  # fmt: skip
    return Built(config, averaged, open_bundle(build_bundle(plan, folder / "bundle")))


@pytest.mark.parametrize("name", BUILT)
def test_graph_keeps_its_contract_and_becomes_an_engine(built, name):
    graph, path = built.bundle.graph(f"target/{name}"), built.bundle.graph_file(f"target/{name}")
    assert 0 < graph.measured_error <= min(t.tolerance for t in graph.spec.outputs if t.tolerance)
    engine = graph.engines["tensorrt-rtx"]
    assert built.bundle.file(engine.file).stat().st_size == engine.bytes
    # An engine holds its weights, of which the widest matrix is but one.
    width = built.config.embed_dim if name == "backbone" else built.config.head_width
    assert engine.bytes > width * width * (4 if name in EXACT else 2)
    assert own_floats(path) <= FREQUENCIES


@pytest.mark.parametrize("built", PUBLISHED[-1:], indirect=True)
@pytest.mark.parametrize("name", LOOPS)
def test_loop_keeps_its_contract(built, name, tmp_path):
    """A bundle with engines in fp16 has none: they are for float32, here of the widest model."""
    model = assemble_mar(built.config, built.averaged, "fp32")
    options = BuildOptions()
    module, spec = model_graphs(model, options.max_batch, options.max_rows)[name]
    weights = built.bundle.manifest.models["target"].first_weights
    shutil.copyfile(built.bundle.file(weights), tmp_path / "weights.safetensors")
    schedule = make_schedule(ScheduleSpec(), 10)
    builder = GraphBuilder(tmp_path, schedule, ENGINES, lambda line: None, no_progress)
    graph = builder.build(name, module, spec, module, "weights.safetensors")
    assert 0 < graph.measured_error <= min(t.tolerance for t in spec.outputs if t.tolerance)
    assert bool(graph.engines) == spec.engines
    assert own_floats(tmp_path / graph.file) <= FREQUENCIES


def own_floats(path: Path) -> int:
    """Numbers in the largest constant of floats that lies in the graph, not in the weights file."""
    constants = onnx.load(path, load_external_data=False).graph.initializer
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    inside = [t for t in constants if t.data_location != TensorProto.EXTERNAL]
    return max(torch.Size(t.dims).numel() for t in inside if t.data_type in floats)


def test_these_are_all_graphs(built):
    record = built.bundle.manifest.models["target"]
    with torch.device("meta"):
        single = model_graphs(Mar(built.config), 1, 1, hoisted=True)
    assert set(record.graphs) == set(BUILT)
    assert {*BUILT, *LOOPS} == {*record.graphs, *single}


def test_averaged_weights_of_the_authors_checkpoint_are_in_the_bundle(built):
    record = built.bundle.manifest.models["target"]
    assert set(built.averaged) == official_names(1, 1, 1)
    assert record.source == "model_ema" and record.config["head_width"] == built.config.head_width
    stored = load_file(built.bundle.file(record.weights))
    assert set(stored) == set(built.averaged)
    for name, tensor in stored.items():
        assert torch.equal(tensor, built.averaged[name].to(tensor.dtype)), name
