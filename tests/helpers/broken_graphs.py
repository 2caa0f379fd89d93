"""Graphs of the shipped pair whose outputs are not what their contract says."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

RIGHT = "right"  # what the output was called before


def node(op: str, *inputs: str, out: str, **attributes):
    return helper.make_node(op, [RIGHT, *inputs], [out], **attributes)


def cast(kind: str):
    return lambda out: [node("Cast", out=out, to=getattr(TensorProto, kind))]


def joined(axis: int):
    return lambda out: [node("Concat", RIGHT, out=out, axis=axis)]


# By kind, the nodes that make the wrong output `out` of the right one.
KINDS = {
    "more rank": lambda out: [node("Unsqueeze", "zero", out=out)],
    "less rank": lambda out: [node("Reshape", "all", out=out)],
    "scalar": lambda out: [node("ReduceMax", out=out, keepdims=0)],
    "more rows": joined(0),
    "twice along axis 1": joined(1),
    "twice along the last": joined(-1),
    "one row": lambda out: [node("ReduceMax", "last", out=out, keepdims=1)],
    "empty": lambda out: [node("Slice", "zero", "zero", "zero", out=out)],
    "float64": cast("DOUBLE"), "float16": cast("FLOAT16"), "int64": cast("INT64"),
    "uint8": cast("UINT8"), "bool": cast("BOOL"), "string": cast("STRING"),
    "sequence": lambda out: [node("SequenceConstruct", out=out)],
    "optional": lambda out: [node("Optional", out=out)],
    "another name": lambda out: [node("Identity", out="other")],
}  # fmt: skip
# Larger images, by a shape that nobody can tell before the graph runs.
LARGER = [
    helper.make_node("ReduceMax", [RIGHT], ["one"], keepdims=1),
    helper.make_node("Shape", [RIGHT], ["shape"]),
    helper.make_node("Cast", ["shape"], ["float"], to=TensorProto.FLOAT),
    helper.make_node("Add", ["float", "more"], ["large"]),
    helper.make_node("Cast", ["large"], ["size"], to=TensorProto.INT64),
    helper.make_node("Expand", ["one", "size"], ["images"]),
]
CONSTANTS = {"zero": np.array([0]), "all": np.array([-1]), "last": np.array([-1])}


def renamed(graph: onnx.GraphProto, name: str, *, inner: bool = False) -> None:
    """Call the value `name`, made by a node of the whole graph, RIGHT wherever it is read."""
    for place in graph.node:
        place.input[:] = [RIGHT if value == name else value for value in place.input]
        if not inner:
            place.output[:] = [RIGHT if value == name else value for value in place.output]
        for attribute in place.attribute:
            renamed(attribute.g, name, inner=True)


def remade(content: bytes, name: str, nodes: list, *, declare: bool = True) -> bytes:
    """The graph with other `nodes` behind its output; `declare`: it goes on promising the old."""
    return _remade(content, name, nodes, CONSTANTS, declare)


def larger(content: bytes, side: int) -> bytes:
    """A decoder of images of 28 x 28 that returns `side` x `side`, and promises 28 x 28."""
    more = np.array([0, 0, side - 28, side - 28], np.float32)
    return _remade(content, "images", LARGER, {"more": more}, True)


def _remade(content: bytes, name: str, nodes: list, constants: dict, declare: bool) -> bytes:
    model = onnx.load_from_string(content)
    renamed(model.graph, name)
    used = {value for made in nodes for value in made.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(value, key) for key, value in constants.items() if key in used
    )
    model.graph.node.extend(nodes)
    last = nodes[-1].output[0]
    for output in model.graph.output:
        if output.name == name and not (declare and last == name):
            output.CopyFrom(onnx.ValueInfoProto(name=last))
    return model.SerializeToString()
