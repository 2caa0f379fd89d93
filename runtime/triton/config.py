"""Text of `config.pbtxt` files: what NVIDIA Triton has to know of a model, from its contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cspd.engines.manifest import Geometry
from cspd.engines.spec import GraphSpec, TensorSpec

TYPES = {"float32": "TYPE_FP32", "int32": "TYPE_INT32"}
KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}


class Port(NamedTuple):
    """One input or output as Triton sees it; `shape` is given where the model's differs."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False
    shape: tuple[int, ...] | None = None


# Inputs of the loop beside `labels`; names are fields of RunConfig. Floats are float64, so that a
# setting is the same number as on the command line.
SETTINGS = {
    "method": "TYPE_STRING",
    "seed": "TYPE_UINT64",
    "num_iter": "TYPE_INT32",
    "head_steps": "TYPE_INT32",
    "gamma": "TYPE_INT32",
    "window": "TYPE_INT32",
    "cfg": "TYPE_FP64",
    "temperature": "TYPE_FP64",
}


def batch_axis(spec: GraphSpec) -> str | None:
    """The axis along which Triton may join requests: first in every tensor and nowhere else.

    An axis that bounds index values is none: joined rows would point into each other.
    """
    tensors = (*spec.inputs, *spec.outputs)
    first = tensors[0].shape[:1]
    axis = first[0] if first else None
    if not isinstance(axis, str):
        return None
    alone = all(t.shape[:1] == (axis,) and axis not in t.shape[1:] for t in tensors)
    return axis if alone and all(tensor.below != axis for tensor in tensors) else None


def graph_config(name: str, spec: GraphSpec, backend: str, device: str) -> str:
    """Config of one graph. `backend` is "onnxruntime" or "tensorrt", `device` "cpu" or "cuda"."""
    axis = batch_axis(spec)
    skipped = 0 if axis is None else 1
    lines = [
        *_head(name, backend, 0 if axis is None else spec.axes[axis].max),
        *_ports("input", (_port(tensor, skipped) for tensor in spec.inputs)),
        *_ports("output", (_port(tensor, skipped) for tensor in spec.outputs)),
        *_instance(device),
    ]
    if axis is not None:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def loop_config(name: str, geometry: Geometry, device: str, parameters: Mapping[str, str]) -> str:
    """Config of the Python model that runs the decoding loop."""
    inputs = [Port("labels", "TYPE_INT32", (-1,))]
    inputs += [Port(setting, kind, (1,), optional=True) for setting, kind in SETTINGS.items()]
    size = geometry.image_size
    outputs = [
        Port("images", "TYPE_UINT8", (-1, size, size, geometry.image_channels)),
        Port("proposed", "TYPE_INT64", (-1,)),
        Port("accepted", "TYPE_INT64", (-1,)),
        Port("config", "TYPE_STRING", (1,)),
    ]
    lines = [
        *_head(name, "python", 0),
        *_ports("input", inputs),
        *_ports("output", outputs),
        *_instance(device, " gpus: [0]" if device == "cuda" else ""),
    ]
    for key, value in parameters.items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    return "\n".join(lines) + "\n"


def _head(name: str, backend: str, max_batch: int) -> list[str]:
    platform = ['platform: "tensorrt_plan"'] if backend == "tensorrt" else []
    return [f'name: "{name}"', f'backend: "{backend}"', *platform, f"max_batch_size: {max_batch}"]


def _instance(device: str, where: str = "") -> list[str]:
    return [f"instance_group [ {{ kind: {KINDS[device]} count: 1{where} }} ]"]


def _port(tensor: TensorSpec, skipped: int) -> Port:
    """Triton's view of a tensor; it wants at least one size, so a scalar is sent as [1]."""
    dims = tuple(-1 if isinstance(axis, str) else axis for axis in tensor.shape[skipped:])
    if not dims:
        return Port(tensor.name, TYPES[tensor.dtype], (1,), shape=())
    return Port(tensor.name, TYPES[tensor.dtype], dims)


def _ports(side: str, ports: Iterable[Port]) -> list[str]:
    lines = []
    for port in ports:
        fields = [
            f'name: "{port.name}"',
            f"data_type: {port.data_type}",
            f"dims: {list(port.dims)}",
        ]
        if port.shape is not None:
            fields.append(f"reshape: {{ shape: {list(port.shape)} }}")
        if port.optional:
            fields.append("optional: true")
        lines.append(f"{side} {{ {' '.join(fields)} }}")
    return lines
