"""The speculative denoising loop as one ONNX graph: an ONNX Loop over a round.

The round is exported on its own and taken apart here: what no round changes is computed ahead of
the loop, the rest is its body.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from cspd.engines.spec import GraphSpec
from cspd.export.graphs.speculative_loop import SpeculativeLoopGraph
from cspd.export.graphs.speculative_step import CARRIED, LOGGED
from cspd.export.onnx.scan import constant, hoist_invariants
from cspd.export.onnx.trace import finish, trace_graph

SIZES = {"tokens": 3, "steps": 5, "window": 7, "pool": 64, "branches": 2}  # for tracing only
WIDE = ("x", "x0", "fraction")  # inputs of the graph that the loop carries as [N, 1, C]


def export_speculative_loop(module: SpeculativeLoopGraph, spec: GraphSpec) -> ir.Model:
    """ONNX model of the whole loop for the contract `spec`."""
    model = _export_round(module, spec)
    body = model.graph
    arguments = {str(value.name): value for value in body.inputs}
    inputs = [_graph_input(arguments, tensor.name, tensor.shape) for tensor in spec.inputs]
    carried = [arguments[name] for name in CARRIED]
    body.inputs[:] = carried
    active = next(value for value in body.outputs if value.name == "next_active")
    for node in body:
        node.name = f"round.{node.name}"
        for output in node.outputs:
            output.name = f"round.{output.name}"
    outer = ir.Graph(inputs, [], nodes=[], opset_imports=body.opset_imports, name=spec.name)
    for value in list(body.initializers.values()):
        outer.register_initializer(body.initializers.pop(str(value.name)))
    initial = _entry(outer, {str(value.name): value for value in inputs})
    hoist_invariants(body, outer, dict(zip(carried, initial.values(), strict=True)))
    _make_body(body, active)
    limit = ir.node("Shape", [arguments["candidates"]], attributes={"start": 1, "end": 2})
    trips = ir.node("Squeeze", [limit.outputs[0]])
    loop = ir.node(
        "Loop",
        [trips.outputs[0], constant(outer, "enter", torch.tensor(True)), *initial.values()],
        attributes={"body": body},
        num_outputs=len(CARRIED) + len(LOGGED),
    )
    outer.extend([limit, trips, loop])
    found = dict(zip(CARRIED + LOGGED, loop.outputs, strict=True))
    outer.outputs[:] = _results(outer, found, spec)
    return finish(ir.Model(outer, ir_version=model.ir_version), spec)


def _export_round(module: SpeculativeLoopGraph, spec: GraphSpec) -> ir.Model:
    """The round, its inputs named after what the loop carries and the inputs of the graph."""
    example = spec.example_inputs(SIZES)
    tokens, channels = example["x"].shape
    inputs: dict[str, Tensor] = {name: torch.randn(tokens, 1, channels) for name in CARRIED}
    inputs |= {name: torch.ones(tokens, 1, dtype=torch.int32) for name in ("left", "used")}
    inputs["active"] = torch.ones(tokens, 1, dtype=torch.bool)
    constant = {name: v for name, v in example.items() if name not in (*CARRIED, "step")}
    dynamic = {name: [0] for name in CARRIED}
    for tensor in spec.inputs:
        if tensor.name in constant:
            axes = enumerate(tensor.shape)
            dynamic[tensor.name] = [i for i, axis in axes if isinstance(axis, str)]
    outputs = [*(f"next_{name}" for name in CARRIED), *LOGGED]
    return trace_graph(module.step.eval(), inputs | constant, outputs, dynamic)


def _graph_input(
    arguments: dict[str, ir.Value], name: str, shape: tuple[int | str, ...]
) -> ir.Value:
    """The input `name` of the whole graph: that of the round, unless the loop carries it."""
    if name in arguments and name not in CARRIED:
        return arguments[name]
    kind = ir.DataType.INT32 if name == "step" else ir.DataType.FLOAT
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def _entry(graph: ir.Graph, inputs: dict[str, ir.Value]) -> dict[str, ir.Value]:
    """What the loop carries into its first round, in the order of `CARRIED`."""

    def add(kind: str, *sources: ir.Value) -> ir.Value:
        node = ir.node(kind, list(sources))
        graph.append(node)
        return node.outputs[0]

    axis = constant(graph, "token_axis", torch.tensor([1]))
    values = {name: add("Unsqueeze", inputs[name], axis) for name in WIDE}
    one = constant(graph, "one", torch.tensor(1, dtype=torch.int32))
    values["left"] = add("Add", add("Unsqueeze", inputs["step"], axis), one)
    zero = add("Mul", values["x"], constant(graph, "zero", torch.tensor(0.0)))
    values |= {name: zero for name in ("mean", "log_std", "sum_log_std")}
    values["used"] = add("Sub", values["left"], values["left"])
    values["active"] = add("Greater", values["left"], values["used"])
    return {name: values[name] for name in CARRIED}


def _make_body(body: ir.Graph, active: ir.Value) -> None:
    """Give the round the signature of a loop body: number and condition, condition first out."""
    number = ir.node("Cast", [active], attributes={"to": ir.DataType.INT32})
    any_active = ir.node("ReduceMax", [number.outputs[0]], attributes={"keepdims": 0})
    again = ir.node("Cast", [any_active.outputs[0]], attributes={"to": ir.DataType.BOOL})
    again.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    body.extend([number, any_active, again])
    trip = ir.Value(name="round", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    go_on = ir.Value(name="go_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    for value in (*body.inputs, *body.outputs):
        value.shape = None
        value.metadata_props.clear()
    body.inputs[:] = [trip, go_on, *body.inputs]
    body.outputs[:] = [again.outputs[0], *body.outputs]
    body.metadata_props.clear()


def _results(graph: ir.Graph, found: dict[str, ir.Value], spec: GraphSpec) -> list[ir.Value]:
    """The outputs of `spec` from what the loop carried out and logged."""

    def add(kind: str, *sources: ir.Value, **attributes: int | list[int]) -> ir.Value:
        node = ir.node(kind, list(sources), attributes=dict(attributes))
        graph.append(node)
        return node.outputs[0]

    axis, one = graph.initializers["token_axis"], graph.initializers["one"]
    left = add("Squeeze", found["left"], axis)
    values = {"next_step": add("Sub", left, one)}
    names = {"next_x": "x", "next_x0": "x0", "next_fraction": "fraction"}
    for tensor in spec.outputs:
        source = names.get(tensor.name, tensor.name)
        if source in CARRIED:
            values[tensor.name] = add("Squeeze", found[source], axis)
    pool = _axis_of(graph, "candidates", 1)
    blank = add("Concat", pool, _axis_of(graph, "candidates", 0), axis=0)
    blank = add("Cast", add("ConstantOfShape", blank), to=ir.DataType.INT32)
    start = add("Sub", pool, pool)
    for name in LOGGED:
        padded = add("Concat", found[name], blank, axis=0)
        cut = add("Slice", padded, start, pool)
        values[name] = add("Transpose", cut, perm=[1, 0])
    outputs = []
    for tensor in spec.outputs:
        value = values[tensor.name]
        kind = ir.DataType.FLOAT if tensor.dtype == "float32" else ir.DataType.INT32
        value.name, value.type = tensor.name, ir.TensorType(kind)
        value.shape = ir.Shape(tensor.shape)
        outputs.append(value)
    return outputs


def _axis_of(graph: ir.Graph, name: str, axis: int) -> ir.Value:
    """Size of an axis of an input, as a vector of one."""
    source = next(value for value in graph.inputs if value.name == name)
    node = ir.node("Shape", [source], attributes={"start": axis, "end": axis + 1})
    graph.append(node)
    return node.outputs[0]
