"""Small real graphs for the tests of the engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.build_graph import export_any
from cspd.export.graphs.denoiser import PixelDecoder, decoder_spec
from cspd.export.graphs.networks import model_graphs
from cspd.export.mar.assemble import assemble_mar
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import MarConfig
from cspd.export.onnx.trace import save_graph
from cspd.export.weights.random import random_state

TINY = MarConfig(
    4, 32, 1, 1, 4, head_width=32, head_depth=1, token_dim=4, buffer_size=4, num_classes=10
)
MAX_BATCH, MAX_ROWS = 4, 16


@dataclass(frozen=True)
class Graph:
    """One exported graph: its ONNX file, its contract and the module it came from."""

    path: Path
    spec: GraphSpec
    module: nn.Module


GetGraph = Callable[[str, str], Graph]


def tiny_model(precision: str) -> Mar:
    with torch.device("meta"):
        empty = Mar(TINY)
    return assemble_mar(TINY, random_state(empty, seed=1), precision)


def tiny_graph(name: str, precision: str, folder: Path) -> Graph:
    """The graph `name` with its file where `export_tiny` puts it."""
    if name == "decoder":
        spec = decoder_spec(TINY.grid, TINY.token_dim, (1, 8), MAX_BATCH)
        module: nn.Module = PixelDecoder(2)
    else:
        module, spec = model_graphs(tiny_model(precision), MAX_BATCH, MAX_ROWS)[name]
    return Graph(folder / f"{name}.onnx", spec, module)


def export_tiny(name: str, precision: str, folder: Path) -> None:
    """Write the file of a graph, and the weights of its model beside it."""
    graph, weights = tiny_graph(name, precision, folder), folder / "weights.safetensors"
    save_file(tiny_model(precision).state_dict(), weights)
    save_graph(export_any(graph.module, graph.spec), graph.path, weights)


def narrowed(spec: GraphSpec, **axes: tuple[int, int, int]) -> GraphSpec:
    """`spec` with other (min, opt, max) for the named axes."""
    changed = {name: Axis(min=a, opt=b, max=c) for name, (a, b, c) in axes.items()}
    return spec.model_copy(update={"axes": {**spec.axes, **changed}})


def write_onnx(path: Path, nodes: list[onnx.NodeProto], sizes: tuple = ("rows", 4)) -> Path:
    """A graph from `x` to `y`, both float32 of the given sizes, made of `nodes`."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in "xy")
    graph = helper.make_graph(nodes, "hand_made", [x], [y])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def xy_spec(**changes: object) -> GraphSpec:
    """The contract of what `write_onnx` writes."""
    shape = ("rows", 4)
    spec = GraphSpec(
        name="hand_made",
        inputs=(TensorSpec(name="x", shape=shape),),
        outputs=(TensorSpec(name="y", shape=shape),),
        axes={"rows": Axis(min=1, opt=2, max=8)},
    )
    return spec.model_copy(update=changes)
