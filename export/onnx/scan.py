"""The denoising loop as one ONNX graph: the loop's prelude followed by a Scan over its step.

The two parts are exported on their own and joined here, because the exporter's own scan freezes the
number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from cspd.engines.schedule import COLUMNS
from cspd.engines.spec import GraphSpec
from cspd.export.graphs.denoiser_loop import DenoiserLoopGraph
from cspd.export.onnx.trace import finish, trace_graph

STEPS, ROWS, BRANCHES = 5, 3, 2  # for tracing only
CARRIED = ("x", "sum_log_std", "last_log_std", "last_mean")
CONSTANT = ("tile", "first", "last", "weight")
COEFFICIENTS = ("added", "from_x", "scale", "offset")


def export_loop(module: DenoiserLoopGraph, spec: GraphSpec) -> ir.Model:
    """ONNX model of the whole loop for the contract `spec`."""
    prelude, step = _export_prelude(module), _export_step(module)
    inputs = {value.name: value for value in prelude.graph.inputs}
    for tensor in spec.inputs:
        if tensor.name not in inputs:
            inputs[tensor.name] = ir.Value(
                name=tensor.name,
                shape=ir.Shape(tensor.shape),
                type=ir.TensorType(ir.DataType.FLOAT),
            )
    outputs = prelude.graph.outputs
    constants, scanned = outputs[: len(CONSTANT)], outputs[len(CONSTANT) :]
    body = _detach_body(step.graph, prelude.graph, constants)
    hoist_invariants(body, prelude.graph)
    zeros = ir.node("Mul", [inputs["noise0"], constant(prelude.graph, "zero", torch.tensor(0.0))])
    carry = [inputs["noise0"], zeros.outputs[0], zeros.outputs[0], zeros.outputs[0]]
    scan = ir.node(
        "Scan",
        [*carry, *scanned],
        attributes={
            "body": body,
            "num_scan_inputs": len(scanned),
            "scan_input_directions": [1] * len(scanned),  # from the first step S - 1 down to 0
        },
        num_outputs=len(CARRIED),
    )
    prelude.graph.extend([zeros, scan])
    results = dict(zip(("sample", "sum_log_std", "log_std", "mean"), scan.outputs, strict=True))
    for tensor in spec.outputs:
        value = results[tensor.name]
        value.name, value.type = tensor.name, ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(tensor.shape)
    prelude.graph.inputs[:] = [inputs[tensor.name] for tensor in spec.inputs]
    prelude.graph.outputs[:] = [results[tensor.name] for tensor in spec.outputs]
    return finish(prelude, spec)


def _export_prelude(module: DenoiserLoopGraph) -> ir.Model:
    channels, width = _channels(module), module.prelude.diffloss.net.cond_embed.in_features
    inputs = {
        "noise": torch.randn(STEPS, ROWS, channels),
        "conditions": torch.randn(BRANCHES, ROWS, width),
        "guidance": torch.ones(ROWS),
        "temperature": torch.ones(ROWS),
        "schedule": torch.rand(STEPS, len(COLUMNS)),
    }
    dynamic = {name: [0, 1] for name in ("noise", "conditions")}
    dynamic |= {name: [0] for name in ("guidance", "temperature", "schedule")}
    outputs = [*CONSTANT, *COEFFICIENTS, *_modulation_names(module)]
    return trace_graph(module.prelude, inputs, outputs, dynamic)


def _export_step(module: DenoiserLoopGraph) -> ir.Model:
    channels, width = _channels(module), module.step.diffloss.net.cond_embed.out_features
    inputs = {name: torch.randn(ROWS, channels) for name in CARRIED}
    inputs["tile"] = torch.arange(ROWS, dtype=torch.int32).repeat(BRANCHES)
    inputs |= {name: torch.arange(ROWS, dtype=torch.int32) for name in ("first", "last")}
    inputs["weight"] = torch.ones(ROWS, 2 * channels)
    inputs |= {"step_added": torch.randn(ROWS, channels), "step_from_x": torch.ones(1)}
    inputs |= {name: torch.ones(2 * channels) for name in ("step_scale", "step_offset")}
    dynamic = {name: [0] for name in (*CARRIED, *CONSTANT, "step_added")}
    names = [f"step_{name}" for name in _modulation_names(module)]
    inputs |= {name: torch.randn(BRANCHES * ROWS, width) for name in names}
    dynamic |= {name: [0] for name in names}
    outputs = ["next_x", "next_sum_log_std", "next_log_std", "next_mean"]
    return trace_graph(module.step, inputs, outputs, dynamic, variadic=len(names))


def _modulation_names(module: DenoiserLoopGraph) -> list[str]:
    depth = len(module.step.diffloss.net.res_blocks)
    return [f"modulation{i}" for i in range(3 * depth + 2)]


def _detach_body(body: ir.Graph, outer: ir.Graph, constants: Sequence[ir.Value]) -> ir.Graph:
    """Make `body` a Scan body: weights and constants come from the graph around it."""
    arguments = {value.name: value for value in body.inputs}
    for name, value in zip(CONSTANT, constants, strict=True):
        ir.convenience.replace_all_uses_with(arguments[name], value)
    for value in list(body.initializers.values()):
        name = str(body.initializers.pop(str(value.name)).name)
        shared = name if "." in name else f"step.{name}"
        if shared not in outer.initializers:
            copy = ir.Value(
                name=shared, shape=value.shape, type=value.type, const_value=value.const_value
            )
            outer.register_initializer(copy)
        ir.convenience.replace_all_uses_with(value, outer.initializers[shared])
    for node in body.all_nodes():
        node.name = f"step.{node.name}"
        for output in node.outputs:
            output.name = f"step.{output.name}"
    body.inputs[:] = [value for name, value in arguments.items() if name not in CONSTANT]
    for value in (*body.inputs, *body.outputs):
        value.shape = None
        value.metadata_props.clear()
    body.metadata_props.clear()
    return body


def hoist_invariants(
    body: ir.Graph, outer: ir.Graph, initial: Mapping[ir.Value, ir.Value] | None = None
) -> None:
    """Move what no step changes (transposed weights above all) out of the loop.

    `initial` gives the first value of what the loop carries, whose shape stays that.
    """
    varying = set(body.inputs)
    results = set(body.outputs)
    for node in list(body):
        source = node.inputs[0] if node.op_type == "Shape" else None
        if initial and source is not None and source in initial:
            node.replace_input_with(0, initial[source])
        if varying.isdisjoint(node.inputs) and results.isdisjoint(node.outputs):
            body.remove(node)
            outer.append(node)
        else:
            varying.update(node.outputs)


def constant(graph: ir.Graph, name: str, value: Tensor) -> ir.Value:
    """A new constant of `graph`."""
    tensor = ir.tensor(value.numpy(), name=name)
    made = ir.Value(
        name=name,
        shape=ir.Shape(value.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(made)
    return made


def _channels(module: DenoiserLoopGraph) -> int:
    return module.prelude.diffloss.net.token_dim
