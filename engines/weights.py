"""Whether weights are finite, tensor by tensor, in pieces of bounded memory.

A hash vouches for the bytes and not for what they say. One NaN goes unnoticed until an image
reaches it, and ONNX Runtime can turn it into finite numbers where PyTorch gives NaN. Next to
hashing the same file this is cheap: it takes a tenth of the time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cspd.engines.errors import BundleError

PIECE = 1 << 22  # numbers that are looked at together
FLOATING = ("F64", "F32", "F16", "BF16")


def check_weights_file(path: Path) -> None:
    """Raise BundleError naming the first tensor of a safetensors file that is not finite.

    The file is mapped into memory, not read into it.
    """
    rebuild = "rebuild the bundle with cspd-export build"
    try:
        with _opened(path) as file:
            for name in file.keys():
                if file.get_slice(name).get_dtype() not in FLOATING:
                    continue
                if problem := not_finite(file.get_tensor(name)):
                    raise BundleError(
                        f"{path}: {name} {problem}; {rebuild} from a healthy checkpoint"
                    )
    except SafetensorError as error:
        raise BundleError(f"{path}: not a file of safetensors: {error}; {rebuild}") from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The tensors of a file; safetensors takes paths in UTF-8 only, so others go by descriptor."""
    try:
        os.fspath(path).encode()
        name = os.fspath(path)
    except UnicodeEncodeError:
        with path.open("rb") as stream, safe_open(f"/dev/fd/{stream.fileno()}", "pt") as file:
            yield file
        return
    with safe_open(name, framework="pt") as file:
        yield file


def not_finite(tensor: Tensor) -> str:
    """Where a floating `tensor` is not finite in float32: shape, value, row; "" if it is finite."""
    if all(map(_is_finite, _pieces(_stored(tensor)))):
        return ""
    return _first_bad_row(tensor)


def _is_finite(piece: Tensor) -> bool:
    """Whether the extremes are, among which PyTorch counts NaN; faster than to ask every number."""
    return piece.numel() == 0 or all(bool(e.float().isfinite()) for e in piece.aminmax())


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers of `tensor`, some at a time: in a row where they lie in memory like that."""
    if tensor.is_contiguous():
        return iter(tensor.view(-1).split(PIECE))
    return iter(tensor.split(max(1, PIECE // max(1, tensor[0].numel()))))


def _stored(tensor: Tensor) -> Tensor:
    """`tensor` without the repetitions that a stride of 0 makes."""
    for axis, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _first_bad_row(tensor: Tensor) -> str:
    """Where `tensor` is not finite: the value, its index on the first axis, how many more."""
    numbers = tensor.detach().reshape(-1)
    rows = tensor.shape[0] if tensor.ndim else 1
    width = len(numbers) // rows
    value, first, last, count = 0.0, -1, -1, 0
    for start, piece in zip(range(0, len(numbers), PIECE), numbers.split(PIECE), strict=True):
        bad = (~piece.float().isfinite()).nonzero()[:, 0]
        if len(bad) == 0:
            continue
        found = ((bad + start) // width).unique()
        if first < 0:
            value, first = float(piece[bad[0]].float()), int(found[0])
        # A row may have begun in the piece before.
        count += len(found) - int(found[0] == last)
        last = int(found[-1])
    more = f" and in {count - 1} more" if count > 1 else ""
    place = f"{list(tensor.shape)} holds {value} in row {first}{more} of {rows}"
    return place + (", where float16 ends at 65,504" if tensor.dtype == torch.float16 else "")
