"""The contract of one network as data: each tensor once, with its axes, ranges and tolerance.

Example inputs, dynamic shapes for the exporter, engine profiles, checks at run time and parity
tests all derive from a `GraphSpec`, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from cspd.engines.errors import CspdError, NonFiniteError, overflow_advice

DTYPES = {"float32": torch.float32, "int32": torch.int32}
NAME_PATTERN = r"^[a-z][a-z0-9_]*$"


class Record(BaseModel):
    """Base of everything that is written to a manifest: immutable, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Axis(Record):
    """Range of a dynamic axis: the sizes an engine must take, and the one it is tuned for."""

    min: int = Field(ge=0)
    opt: int = Field(ge=0)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"axis range {self.min}..{self.opt}..{self.max} is not ordered")
        return self


class TensorSpec(Record):
    """One input or output. `shape` mixes fixed sizes and names of dynamic axes.

    `below` bounds the values of an index tensor (a number or an axis name), which do not repeat
    along the last axis if `distinct`, and never are the largest of them if `spares_last` (the first
    denoising step, where another graph takes it); `tolerance` is the largest relative error of the
    norm against PyTorch in float32 that an output may have.
    """

    name: str = Field(pattern=NAME_PATTERN)
    dtype: str = Field("float32", pattern="^(float32|int32)$")
    shape: tuple[int | str, ...]
    below: int | str | None = None
    distinct: bool = False
    spares_last: bool = False
    tolerance: float | None = None

    def sizes(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """Concrete shape for the given axis sizes."""
        return tuple(axes[axis] if isinstance(axis, str) else axis for axis in self.shape)


class GraphSpec(Record):
    """One exported network: its inputs and outputs, and the range of every dynamic axis.

    Along the axis `independent` nothing depends on anything else, so that a call may be cut there:
    every output has the axis, and so have the inputs that must be cut. `scratch` float32 numbers
    are held per row, branch and step while the graph runs.
    """

    name: str = Field(pattern=NAME_PATTERN)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: dict[str, Axis]
    # False for graphs with a loop inside, which no CUDA graph can hold.
    capturable: bool = True
    # False for graphs that only ONNX Runtime runs: engines are not built of them.
    engines: bool = True
    independent: str | None = None
    scratch: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _axes_known(self) -> GraphSpec:
        used = {a for t in (*self.inputs, *self.outputs) for a in t.shape if isinstance(a, str)}
        if used - set(self.axes):
            raise ValueError(
                f"graph {self.name}: axes without a range: {sorted(used - set(self.axes))}"
            )
        read = {axis for tensor in self.inputs for axis in tensor.shape}
        free = {a for t in self.outputs for a in t.shape if isinstance(a, str)} - read
        if free:
            raise ValueError(f"graph {self.name}: no input tells the size of {sorted(free)}")
        if self.independent and not all(self.independent in t.shape for t in self.outputs):
            raise ValueError(
                f"graph {self.name}: an output lacks the independent axis {self.independent}"
            )
        return self

    def sizes(self, which: str) -> dict[str, int]:
        """Size of every axis at `which`, one of "min", "opt", "max"."""
        return {name: getattr(axis, which) for name, axis in self.axes.items()}

    def example_inputs(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
        """Random inputs of the given axis sizes: standard normal floats, indices within bounds."""
        generator = torch.Generator().manual_seed(seed)
        inputs = {}
        for tensor in self.inputs:
            shape = tensor.sizes(sizes)
            if tensor.dtype == "float32":
                inputs[tensor.name] = torch.randn(shape, generator=generator)
                continue
            limit = sizes[tensor.below] if isinstance(tensor.below, str) else tensor.below
            if limit and tensor.spares_last:
                limit -= 1
            if tensor.distinct:
                value = torch.rand(*shape[:-1], limit or 1, generator=generator).argsort(-1)
                inputs[tensor.name] = value[..., : shape[-1]].int()
            else:
                inputs[tensor.name] = torch.randint(
                    max(limit or 1, 1), shape, generator=generator
                ).int()
        return inputs

    def bind(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Axis sizes of `tensors`; raises CspdError unless they fit the contract exactly."""
        expected = {tensor.name for tensor in self.inputs}
        if set(tensors) != expected:
            raise CspdError(
                f"{self.name}: got inputs {sorted(tensors)}, expected {sorted(expected)}"
            )
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            self._bind_tensor(spec, tensors[spec.name], sizes)
        return sizes

    def _bind_tensor(self, spec: TensorSpec, tensor: Tensor, sizes: dict[str, int]) -> None:
        shape = tuple(tensor.shape)
        if tensor.dtype != DTYPES[spec.dtype] or len(shape) != len(spec.shape):
            raise CspdError(
                f"{self.name}: {spec.name} is {tensor.dtype} {list(shape)}, "
                f"expected {spec.dtype} {list(spec.shape)}"
            )
        for axis, size in zip(spec.shape, shape, strict=True):
            known = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            if size != known:
                raise CspdError(
                    f"{self.name}: {spec.name} is {list(shape)}, expected {axis} to be {known}"
                )
            if isinstance(axis, str) and not self.axes[axis].min <= size <= self.axes[axis].max:
                limits = self.axes[axis]
                raise CspdError(
                    f"{self.name}: {spec.name} is {list(shape)}, "
                    f"the graph takes {axis} in {limits.min}..{limits.max}"
                )

    def check_finite(self, outputs: Mapping[str, Tensor], context: str) -> None:
        """Raise NonFiniteError naming graph, output and `context` if a value is not finite."""
        for name, value in outputs.items():
            if not torch.isfinite(value).all():
                raise NonFiniteError(
                    f"{self.name}: {name} holds NaN or infinity at {context}; nothing was saved "
                    f"of them. {overflow_advice()}"
                )
