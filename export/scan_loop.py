"""The denoising loop as one ONNX graph: the loop's prelude followed by a Scan over its step.

The two parts are exported on their own and joined here, because the exporter's own scan freezes the
number of rows.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from cspd.engines.schedule import COLUMNS
from cspd.engines.spec import GraphSpec
from cspd.export.graphs import DenoiserLoopGraph
from cspd.export.onnx_export import finish, trace_graph

STEPS, ROWS, BRANCHES = 5, 3, 2  # for tracing only
CARRIED = ("x", "sum_log_std", "last_log_std", "last_mean")
SCANNED = ("step_noise", "step_time", "step_row")
CONSTANT = ("condition", "guidance", "temperature")


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
    added, time, condition = prelude.graph.outputs
    constants = (condition, inputs["guidance"], inputs["temperature"])
    body = _detach_body(step.graph, prelude.graph, constants)
    _hoist_invariants(body, prelude.graph)
    zeros = ir.node("Mul", [inputs["noise0"], _scalar(prelude.graph, "zero", 0.0)])
    carry = [inputs["noise0"], zeros.outputs[0], zeros.outputs[0], zeros.outputs[0]]
    scan = ir.node(
        "Scan",
        [*carry, added, time, inputs["schedule"]],
        attributes={
            "body": body,
            "num_scan_inputs": len(SCANNED),
            "scan_input_directions": [1] * len(SCANNED),  # from the first step S - 1 down to 0
        },
        num_outputs=len(CARRIED),
    )
    prelude.graph.extend([zeros, scan])
    outputs = dict(zip(("sample", "sum_log_std", "log_std", "mean"), scan.outputs, strict=True))
    for tensor in spec.outputs:
        value = outputs[tensor.name]
        value.name, value.type = tensor.name, ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape(tensor.shape)
    prelude.graph.inputs[:] = [inputs[tensor.name] for tensor in spec.inputs]
    prelude.graph.outputs[:] = [outputs[tensor.name] for tensor in spec.outputs]
    return finish(prelude, spec)


def _export_prelude(module: DenoiserLoopGraph) -> ir.Model:
    channels, width = _channels(module), module.prelude.diffloss.net.cond_embed.in_features
    inputs = {
        "noise": torch.randn(STEPS, ROWS, channels),
        "conditions": torch.randn(BRANCHES, ROWS, width),
        "schedule": torch.rand(STEPS, len(COLUMNS)),
    }
    dynamic = {"noise": [0, 1], "conditions": [0, 1], "schedule": [0]}
    return trace_graph(module.prelude, inputs, ["added", "time", "condition"], dynamic)


def _export_step(module: DenoiserLoopGraph) -> ir.Model:
    channels, head = _channels(module), module.step.diffloss.net
    width = head.cond_embed.out_features
    inputs = {name: torch.randn(ROWS, channels) for name in (*CARRIED, "step_noise")}
    inputs |= {"step_time": torch.randn(width), "step_row": torch.rand(len(COLUMNS))}
    inputs["condition"] = torch.randn(BRANCHES, ROWS, width)
    inputs |= {name: torch.ones(ROWS) for name in ("guidance", "temperature")}
    dynamic = {name: [0] for name in inputs if name not in ("step_time", "step_row")}
    dynamic["condition"] = [0, 1]
    outputs = ["next_x", "next_sum_log_std", "next_log_std", "next_mean"]
    return trace_graph(module.step, inputs, outputs, dynamic)


def _detach_body(body: ir.Graph, outer: ir.Graph, constants: tuple[ir.Value, ...]) -> ir.Graph:
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
    body.inputs[:] = [arguments[name] for name in (*CARRIED, *SCANNED)]
    for value in (*body.inputs, *body.outputs):
        value.shape = None
        value.metadata_props.clear()
    body.metadata_props.clear()
    return body


def _hoist_invariants(body: ir.Graph, outer: ir.Graph) -> None:
    """Move what no step changes (transposed weights above all) out of the loop."""
    varying = set(body.inputs)
    results = set(body.outputs)
    for node in list(body):
        if varying.isdisjoint(node.inputs) and results.isdisjoint(node.outputs):
            body.remove(node)
            outer.append(node)
        else:
            varying.update(node.outputs)


def _scalar(graph: ir.Graph, name: str, number: float) -> ir.Value:
    tensor = ir.tensor(torch.tensor(number).numpy(), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _channels(module: DenoiserLoopGraph) -> int:
    return module.prelude.diffloss.net.token_dim
