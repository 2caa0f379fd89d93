"""A graph as its runtime describes it, and every call of it, compared with the contract.

The hash of a graph says that it is the one in the manifest, not that it keeps the contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cspd.engines.errors import BundleError
from cspd.engines.spec import DTYPES, GraphSpec, TensorSpec

REMEDY = "rebuild it with cspd-export build"
MAX_KNOWN = 1024  # combinations of input shapes that are remembered as checked

# What each output must be: dtype and shape by name.
Expected = Mapping[str, tuple[torch.dtype, torch.Size]]


@dataclass(frozen=True)
class Declared:
    """What a runtime says of one tensor: its type, and its sizes where they are known.

    `dtype` is a name of ours, or the runtime's own for a type that no contract has.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def check_interface(
    spec: GraphSpec, inputs: Iterable[Declared], outputs: Iterable[Declared]
) -> None:
    """Raise BundleError unless the graph has the names, types, ranks and sizes of `spec`."""
    groups = (("input", spec.inputs, inputs), ("output", spec.outputs, outputs))
    for kind, promised, declared in groups:
        found = {tensor.name: tensor for tensor in declared}
        names = {tensor.name for tensor in promised}
        if set(found) != names:
            raise BundleError(
                f"{spec.name}: the graph has {kind}s {sorted(found)}, "
                f"expected {sorted(names)}; {REMEDY}"
            )
        for tensor in promised:
            _check_declared(spec, tensor, found[tensor.name])


def _check_declared(spec: GraphSpec, promised: TensorSpec, found: Declared) -> None:
    sizes = [_allowed(spec, axis) for axis in promised.shape]
    fits = found.dtype == promised.dtype and len(found.shape) == len(sizes)
    if not fits or any(a not in (None, b) for a, b in zip(found.shape, sizes, strict=True)):
        shown = ["?" if size is None else size for size in found.shape]
        raise BundleError(
            f"{spec.name}: {promised.name} of the graph is {found.dtype} {shown}, "
            f"expected {promised.dtype} {list(promised.shape)}; {REMEDY}"
        )


def _allowed(spec: GraphSpec, axis: int | str) -> int | None:
    """The one size that a graph may fix for `axis`; None if it has to take several."""
    if isinstance(axis, int):
        return axis
    limits = spec.axes[axis]
    return limits.min if limits.min == limits.max else None


class CallCheck:
    """Compares the calls of one session with its contract.

    Checking 18 tensors takes longer than denoising one token: shapes seen before are looked up.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self._known: dict[tuple[tuple[str, torch.dtype, torch.Size], ...], Expected] = {}

    def inputs(self, tensors: Mapping[str, Tensor]) -> Expected:
        """What the outputs must be for `tensors`; CspdError if these break the contract.

        Equal shapes get the same object.
        """
        key = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        expected = self._known.get(key)
        if expected is None:
            sizes = self.spec.bind(tensors)
            expected = {
                t.name: (DTYPES[t.dtype], torch.Size(t.sizes(sizes))) for t in self.spec.outputs
            }
            if len(self._known) >= MAX_KNOWN:
                self._known = {}
            self._known[key] = expected
        return expected

    def outputs(self, outputs: dict[str, Tensor], expected: Expected) -> dict[str, Tensor]:
        """`outputs` as they are; BundleError unless each is as `expected`."""
        for name, (dtype, shape) in expected.items():
            value = outputs[name]
            if value.dtype != dtype or value.shape != shape:
                self.refuse(name, f"{value.dtype} {list(value.shape)}", expected)
        return outputs

    def refuse(self, name: str, found: str, expected: Expected) -> None:
        """Raise BundleError: the output `name` is something else, `found`."""
        dtype, shape = expected[name]
        raise BundleError(
            f"{self.spec.name}: the graph returned {name} as {found}, "
            f"expected {dtype} {list(shape)}; {REMEDY}"
        )
