"""Does an exported graph compute what PyTorch computes? Asked before a bundle is published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cspd.engines.errors import CspdError
from cspd.engines.schedule import Schedule
from cspd.engines.sessions.ort import ort_session
from cspd.engines.sessions.session import Session, TorchSession
from cspd.engines.spec import GraphSpec

MAX_FLIPPED = 0.1  # share of tokens of a comparison, of which there are 16 at most


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    scale = reference.double().norm().clamp_min(1e-30)
    return float((value.double() - reference.double()).norm() / scale)


def realistic_inputs(
    spec: GraphSpec, sizes: Mapping[str, int], schedule: Schedule, seed: int
) -> dict[str, Tensor]:
    """Random inputs of a graph, with a true schedule and usual guidance and temperature."""
    sizes = dict(sizes)
    if "steps" in sizes:
        sizes["steps"] = schedule.num_steps
    inputs = spec.example_inputs(sizes, seed)
    for name, low, high in (("guidance", 1.0, 4.0), ("temperature", 0.9, 1.1)):
        if name in inputs:
            inputs[name] = torch.linspace(low, high, len(inputs[name]))
    if "schedule" in inputs:
        inputs["schedule"] = schedule.table
    for name in inputs:
        if name.startswith("log_"):
            inputs[name] = -inputs[name].abs()
        elif name.startswith("draft_"):
            # Weights of a linear recurrence that shrinks.
            inputs[name] = inputs[name].abs() / 10
        elif name == "choices":
            inputs[name] = inputs[name].abs().clamp(max=0.99)
    return inputs


def check_sizes(spec: GraphSpec) -> list[dict[str, int]]:
    """Axis sizes to compare at: the smallest, an odd one, and one within an ordinary budget."""
    smallest = spec.sizes("min")
    odd = {name: min(max(axis.min, 3), axis.max) for name, axis in spec.axes.items()}
    usual = {name: min(axis.max, 16 if name != "batch" else 2) for name, axis in spec.axes.items()}
    return [smallest, odd, usual]


def compare(
    session: Session, reference: Session, schedule: Schedule, seed: int = 0
) -> dict[str, float]:
    """Largest relative error of each output over all `check_sizes`."""
    worst: dict[str, float] = {}
    for sizes in check_sizes(session.spec):
        inputs = realistic_inputs(session.spec, sizes, schedule, seed)
        got, expected = session(**inputs), reference(**inputs)
        agree = agreement(session.spec, got, expected)
        flipped = 1 - float(agree.double().mean())
        for name, value in got.items():
            error = relative_error(value[agree], expected[name][agree])
            errors = (worst.get(name, 0.0), error if flipped <= MAX_FLIPPED else math.inf)
            # max() alone would drop a NaN.
            worst[name] = math.nan if any(map(math.isnan, errors)) else max(errors)
    return worst


def agreement(spec: GraphSpec, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
    """Rows, bool [N], in which all whole numbers agree: where one differs, another path was taken.

    A test whose number lies within rounding of its bound may turn; that is no error of the graph.
    """
    agree = torch.ones(len(next(iter(expected.values()))), dtype=torch.bool)
    for tensor in spec.outputs:
        if tensor.dtype != "float32":
            same = got[tensor.name] == expected[tensor.name]
            agree &= same.flatten(1).all(1) if same.dim() > 1 else same
    return agree


def judge(module: nn.Module) -> Literal["onnxruntime", "torch"]:
    """What can run the exported `module` here: ONNX Runtime has no bfloat16 products on the CPU."""
    bfloat16 = any(p.dtype == torch.bfloat16 for p in module.parameters())
    return "torch" if bfloat16 else "onnxruntime"


def verify_graph(
    path: Path, spec: GraphSpec, module: nn.Module, exact: nn.Module, schedule: Schedule
) -> float:
    """Largest relative error of the ONNX file of `module` against `exact`, which is in float32.

    Where the file cannot run here (see `judge`), `module` itself stands in for it. Raises CspdError
    beyond the tolerance.
    """
    cpu = torch.device("cpu")
    if judge(module) == "onnxruntime":
        session: Session = ort_session(str(path), spec)
    else:
        session = TorchSession(spec, module, cpu)
    worst = compare(session, TorchSession(spec, exact, cpu), schedule)
    for tensor in spec.outputs:
        error = worst[tensor.name]
        if tensor.tolerance is not None and not error <= tensor.tolerance:
            raise CspdError(
                f"{spec.name}: {tensor.name} differs from PyTorch by {error:.2e} relative, "
                f"the contract allows {tensor.tolerance:.0e}; the bundle was not published"
            )
    return max(worst.values())
