"""Whether tensors can be weights: their number format, and that every number is finite.

One bad row goes unnoticed through export, verification and parity, whose inputs need not reach it,
and fails while an image is made.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cspd.engines.errors import CspdError

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
        if not _is_finite(tensor):
            raise CspdError(f"{owner}: {name} {_first_bad_row(tensor)}; {advice}")


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


def _is_finite(tensor: Tensor) -> bool:
    """Whether every number of `tensor` is finite in float32."""
    values = _stored(tensor)
    # A finite sum has finite terms and takes a tenth of the time; an infinite one proves nothing.
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _stored(tensor: Tensor) -> Tensor:
    """`tensor` without the repetitions that a stride of 0 makes, in float32 if it has more."""
    for axis, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _first_bad_row(tensor: Tensor) -> str:
    """Where `tensor` is not finite: the value, and its index on the first axis."""
    rows = tensor.detach().float().reshape(tensor.shape[0] if tensor.ndim else 1, -1)
    bad = (~rows.isfinite()).any(1).nonzero()[:, 0]
    row = rows[bad[0]]
    value = float(row[~row.isfinite()][0])
    more = f" and in {len(bad) - 1} more" if len(bad) > 1 else ""
    place = f"{list(tensor.shape)} holds {value} in row {int(bad[0])}{more} of {len(rows)}"
    return place + (", where float16 ends at 65,504" if tensor.dtype == torch.float16 else "")
