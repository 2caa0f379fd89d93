"""What would make an exported graph fail or be slow as an engine, found before the long build."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from cspd.engines.errors import CspdError, MissingExtraError
from cspd.engines.spec import GraphSpec, Record, TensorSpec
from cspd.engines.trt.api import import_trt, parse_onnx, trt_log

CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# elem_type of ONNX tensors
INT64 = 7
ELEMENT_TYPES = {"float32": 1, "int32": 6}


class Finding(Record):
    """One thing wrong with a graph. An error stops the build; a warning costs speed or safety."""

    rule: Literal["control-flow", "contract", "dynamic-axis", "int64", "parser"]
    severity: Literal["error", "warning"]
    message: str


def lint_model(path: Path, spec: GraphSpec | None, flavour: str | None) -> list[Finding]:
    """Everything that is wrong with the ONNX file at `path`; empty if nothing is.

    `spec` is the contract it should fulfil; without one, only its own declarations are judged.
    With a `flavour` of TensorRT the real parser is asked. Weights are not read for the other
    rules. Raises MissingExtraError without the onnx library, CspdError for an unreadable file.
    """
    graph = _load(path).graph
    findings = [*_control_flow(graph, spec), *_int64(graph, spec)]
    if spec is not None:
        findings += _contract(graph, spec)
    if flavour is not None:
        findings += _parser(path, flavour)
    return findings


def refuse_errors(name: str, findings: Iterable[Finding]) -> None:
    """Raise CspdError listing the errors among `findings`, if there are any."""
    errors = [f"  {f.rule}: {f.message}" for f in findings if f.severity == "error"]
    if errors:
        raise CspdError(f"{name}: cannot be built:\n" + "\n".join(errors))


def _load(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError:
        raise MissingExtraError("onnx", "export") from None
    try:
        # The format is given: by itself, onnx goes by the name of the file.
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise CspdError(f"{path}: cannot be read: {error.strerror or error}") from None
    except DecodeError:
        raise CspdError(f"{path}: is not an ONNX file") from None
    if not model.graph.node:
        raise CspdError(f"{path}: is not an ONNX file, or holds no nodes")
    return model


def _nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _control_flow(graph: Any, spec: GraphSpec | None) -> Iterator[Finding]:
    if spec is not None and not spec.capturable:
        return
    for node in _nodes(graph):
        if node.op_type in CONTROL_FLOW:
            yield Finding(
                rule="control-flow",
                severity="warning" if spec is None else "error",
                message=f"node {node.name or node.output[0]} is a {node.op_type}: "
                "no CUDA graph can hold it; export the step and loop outside",
            )


def _int64(graph: Any, spec: GraphSpec | None) -> Iterator[Finding]:
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == INT64:
            yield Finding(
                rule="int64",
                severity="warning" if spec is None else "error",
                message=f"{value.name} is int64; cast it to int32 before the export",
            )


def _contract(graph: Any, spec: GraphSpec) -> Iterator[Finding]:
    """Names, types, fixed sizes, and axes that are dynamic and independent of each other."""
    symbols: dict[str, str] = {}
    sides = (("input", graph.input, spec.inputs), ("output", graph.output, spec.outputs))
    for side, values, tensors in sides:
        found = {value.name: value for value in values}
        expected = {tensor.name: tensor for tensor in tensors}
        for name in sorted(set(found) ^ set(expected)):
            problem = "is not in the contract" if name in found else "is missing"
            yield Finding(rule="contract", severity="error", message=f"{side} {name} {problem}")
        for name in sorted(set(found) & set(expected)):
            yield from _tensor(side, found[name].type.tensor_type, expected[name], symbols)


def _tensor(
    side: str, found: Any, tensor: TensorSpec, symbols: dict[str, str]
) -> Iterator[Finding]:
    # Types: int64 has its own rule.
    if found.elem_type not in (ELEMENT_TYPES[tensor.dtype], INT64):
        message = f"{tensor.name} has ONNX type {found.elem_type}, expected {tensor.dtype}"
        yield Finding(rule="contract", severity="error", message=message)
    sizes = found.shape.dim
    if len(sizes) != len(tensor.shape):
        message = f"{tensor.name} has {len(sizes)} axes, expected {list(tensor.shape)}"
        yield Finding(rule="contract", severity="error", message=message)
        return
    for axis, size in zip(tensor.shape, sizes, strict=True):
        problem = _axis(side, axis, size, symbols)
        if problem:
            message = f"{tensor.name} {list(tensor.shape)}: {problem}"
            yield Finding(rule="dynamic-axis", severity="error", message=message)


def _axis(side: str, axis: int | str, size: Any, symbols: dict[str, str]) -> str | None:
    """What is wrong with one axis; None if nothing is.

    `symbols` collects which axis each symbol of an input stands for. An output's size may be
    computed, and its symbol is then free.
    """
    fixed = size.dim_value if size.HasField("dim_value") else None
    if isinstance(axis, int):
        computed = side == "output" and fixed is None
        return None if computed or fixed == axis else f"got size {fixed or 'dynamic'} for {axis}"
    if fixed is not None:
        return f"{axis} is frozen at {fixed}; export with another example size"
    symbol = size.dim_param or axis
    if side == "input" and symbols.setdefault(symbol, axis) != axis:
        return f"{axis} is tied to {symbols[symbol]}; export with different example sizes"
    return None


def _parser(path: Path, flavour: str) -> list[Finding]:
    """The real parser's objections, each with its node."""
    trt, log = import_trt(flavour), trt_log(flavour)
    _, _, errors = parse_onnx(trt, trt.Builder(log.logger), log, path)
    return [Finding(rule="parser", severity="error", message=error) for error in errors]
