"""Whether tensors can be weights: their number format, and that every number is finite.

One bad row goes unnoticed through export, verification and parity, whose inputs need not reach it,
and fails while an image is made.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.engines.weights import not_finite

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUANTISED = ("float8", "float4", "int4", "uint4", "int8", "uint8")


def check_dense(state: Mapping[str, Tensor], owner: object) -> None:
    """Raise CspdError naming the first tensor of `state` that is not dense: it may have no shape.

    `owner` begins the message.
    """
    for name, tensor in state.items():
        if kind := _unusual_kind(tensor):
            raise CspdError(
                f"{owner}: {name} is {kind}, no dense tensor of floating-point numbers; save it "
                "as one"
            )


def check_values(
    state: Mapping[str, Tensor], owner: object, advice: str = "get the weights again"
) -> None:
    """Raise CspdError naming the first tensor of `state` that no network can compute with.

    Dense tensors of float16, bfloat16, float32 or float64 whose values are finite in float32 pass.
    `owner` and `advice` begin and end the message. Reads every number once.
    """
    check_dense(state, owner)
    for name, tensor in state.items():
        if problem := _format_problem(tensor):
            raise CspdError(f"{owner}: {name} is {problem}")
        if problem := not_finite(tensor):
            raise CspdError(f"{owner}: {name} {problem}; {advice}")


def _unusual_kind(tensor: Tensor) -> str:
    """What `tensor` is in place of numbers one after another in memory; empty if it is that."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    layout = str(tensor.layout).removeprefix("torch.")
    place = f" on {tensor.device.type}" if tensor.device.type != "cpu" else ""
    return f"{layout}{place}" if tensor.layout != torch.strided or place else ""


def _format_problem(tensor: Tensor) -> str:
    """What is wrong with the number format of `tensor`, if anything."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.dtype in DTYPES:
        return ""
    reason = ""
    if dtype.startswith(QUANTISED):
        reason = ", a quantised format whose scales are not part of a state dict"
    return (
        f"{dtype}{reason}, expected float32, bfloat16, float16 or float64; use the weights as they "
        "were before the conversion"
    )
