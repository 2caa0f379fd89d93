"""From a traceable module and its GraphSpec to an ONNX model whose weights live in a shared file.

All graphs of one model point into one safetensors file (external data with offsets), so the weights
are stored once, are readable without ONNX, and are hashed once.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from cspd.engines.errors import CspdError
from cspd.engines.spec import GraphSpec, TensorSpec

OPSET = 20
# Sizes used for tracing: distinct, and never 0 or 1, which the exporter would bake in.
TRACE_SIZES = (3, 5, 7, 11, 13, 17)
# Bytes of a constant of different floats, of which the largest is the same for every model: the
# head's 128 frequencies. What is larger is a weight, and those live in the weights file.
MAX_CONSTANT = 4096
SAFETENSORS_DTYPES = {
    "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16,
}  # fmt: skip


def trace_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: list[str],
    dynamic: Mapping[str, list[int]],
    variadic: int = 0,
) -> ir.Model:
    """Export `module` called with `inputs`; `dynamic` lists the free axes of each of them.

    The last `variadic` inputs are those of a `*args` parameter.
    """
    free = [{axis: torch.export.Dim.DYNAMIC for axis in dynamic.get(name, [])} for name in inputs]
    named = len(free) - variadic
    shapes = (*free[:named], *([tuple(free[named:])] if variadic else []))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("the exporter returned no program")
        onnxscript.optimizer.optimize_ir(program.model, should_fold=_keep_weights)
    return program.model


def _keep_weights(node: ir.Node) -> bool | None:
    """Stop the optimiser from folding weights: they must stay those of the file."""
    weights = (v for v in node.inputs if v is not None and v.is_initializer())
    return (
        False
        if any(v.const_value is not None and v.const_value.size > 64 for v in weights)
        else None
    )


def export_graph(module: nn.Module, spec: GraphSpec) -> ir.Model:
    """ONNX model of `module` with the inputs, outputs and axis names of `spec`."""
    sizes = dict(zip(spec.axes, TRACE_SIZES, strict=False))
    if "branches" in sizes:
        sizes["branches"] = 2
    dynamic = {
        t.name: [i for i, axis in enumerate(t.shape) if isinstance(axis, str)] for t in spec.inputs
    }
    names = [tensor.name for tensor in spec.outputs]
    model = trace_graph(module, spec.example_inputs(sizes), names, dynamic)
    return finish(model, spec)


def finish(model: ir.Model, spec: GraphSpec) -> ir.Model:
    """Name the model and its axes after `spec`, drop the exporter's traces of the source."""
    graph = model.graph
    graph.name = spec.name
    for value, tensor in zip(
        [*graph.inputs, *graph.outputs], [*spec.inputs, *spec.outputs], strict=True
    ):
        if value.name != tensor.name:
            raise CspdError(f"{spec.name}: exported {value.name}, the contract says {tensor.name}")
        value.shape = _checked_shape(value, tensor)
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            # Inner shapes carry the exporter's symbols, which mean nothing beside our axis names.
            if value not in graph.outputs:
                value.shape = None
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    return model


def _checked_shape(value: ir.Value, tensor: TensorSpec) -> ir.Shape:
    """The contract's shape for `value`; an axis that the exporter froze is an error."""
    assert value.shape is not None
    for got, expected in zip(value.shape, tensor.shape, strict=True):
        if isinstance(expected, str) == isinstance(got, int):
            raise CspdError(
                f"{tensor.name}: exported shape {value.shape}, the contract says {tensor.shape}"
            )
    return ir.Shape(tensor.shape)


def save_graph(model: ir.Model, path: Path, weights: Path | None) -> None:
    """Write `model`, its weights pointing into the safetensors file `weights` beside it.

    An initializer stored there in half precision but used in float32 is read through a Cast, and a
    constant whose numbers are all equal, such as the scale of a norm that has none, is one number
    spread out: every engine folds both when it loads the graph. Raises CspdError if a weight is not
    in the file.
    """
    stored = _stored_tensors(weights) if weights else {}
    graph = model.graph
    nodes = []
    for value in list(graph.initializers.values()):
        external = stored.get(str(value.name))
        if external is None:
            if (number := _number_of(value)) is not None:
                nodes.append(_spread_initializer(graph, value, number))
            elif _is_weight(value):
                raise CspdError(f"{graph.name}: weight {value.name} is not in the weights file")
        elif external.dtype == value.dtype:
            value.const_value = external
        else:
            nodes.append(_cast_initializer(graph, value, external))
    graph.insert_before(graph[0], nodes)
    ir.save(model, path)


def _number_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The number [1] that all floats of a constant are; None if they differ or are one only."""
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < 2:
        return None
    numbers = tensor.numpy().reshape(-1)
    return ir.tensor(numbers[:1], tensor.dtype) if (numbers == numbers[0]).all() else None


def _is_weight(value: ir.Value) -> bool:
    """Whether a constant holds so many different floats that no graph came by them itself."""
    tensor = value.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and tensor.nbytes > MAX_CONSTANT


def _spread_initializer(graph: ir.Graph, value: ir.Value, number: ir.TensorProtocol) -> ir.Node:
    """Replace initializer `value` by its shape and return the node that fills it with `number`."""
    assert value.const_value is not None
    sizes = list(value.const_value.shape.numpy())
    shape = ir.tensor(sizes, ir.DataType.INT64, name=f"{value.name}.shape")
    source = ir.Value(
        name=shape.name,
        shape=ir.Shape([len(sizes)]),
        type=ir.TensorType(shape.dtype),
        const_value=shape,
    )
    return _replace_initializer(graph, value, source, "ConstantOfShape", {"value": number})


def _cast_initializer(graph: ir.Graph, value: ir.Value, stored: ir.ExternalTensor) -> ir.Node:
    """Replace initializer `value` by `stored` and return the Cast that restores its type."""
    source = ir.Value(
        name=f"{value.name}.stored",
        shape=stored.shape,
        type=ir.TensorType(stored.dtype),
        const_value=stored,
    )
    return _replace_initializer(graph, value, source, "Cast", {"to": value.dtype})


def _replace_initializer(
    graph: ir.Graph, value: ir.Value, source: ir.Value, kind: str, attributes: dict[str, Any]
) -> ir.Node:
    """Replace initializer `value` by `source`; returns the `kind` of node that restores it."""
    name = str(value.name)
    graph.initializers.pop(name)
    graph.register_initializer(source)
    node = ir.node(kind, [source], attributes=attributes, name=f"{name}.{kind.lower()}")
    output = node.outputs[0]
    output.name, output.type, output.shape = name, value.type, value.shape
    value.name = f"{name}.replaced"
    ir.convenience.replace_all_uses_with(value, output)
    return node


def _stored_tensors(path: Path) -> dict[str, ir.ExternalTensor]:
    """Tensors of a safetensors file as ONNX external data."""
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = ir.ExternalTensor(
            path.name, 8 + header_size + begin, end - begin, SAFETENSORS_DTYPES[entry["dtype"]],
            shape=ir.Shape(entry["shape"]), name=name, base_dir=str(path.parent),
        )  # fmt: skip
    return tensors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress and deprecation chatter; its exceptions still surface."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(level)
