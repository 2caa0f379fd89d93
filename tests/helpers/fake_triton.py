"""A stand-in for Triton's `triton_python_backend_utils` that checks what it is given.

It follows the documented interface of the Python backend; that a model runs on it does not prove
that it runs in a Triton server.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import triton_to_np_dtype


@dataclass
class Tensor:
    name: str
    value: np.ndarray

    def __post_init__(self) -> None:
        assert isinstance(self.name, str) and isinstance(self.value, np.ndarray)

    def as_numpy(self) -> np.ndarray:
        return self.value


class TritonError(Exception):
    pass


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def __post_init__(self) -> None:
        assert bool(self.output_tensors) != (self.error is not None)
        assert self.error is None or isinstance(self.error, TritonError)


@dataclass
class Request:
    tensors: dict[str, Tensor]


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return request.tensors.get(name)


def module() -> ModuleType:
    """What `import triton_python_backend_utils` finds."""
    made = ModuleType("triton_python_backend_utils")
    for thing in (Tensor, TritonError, InferenceResponse, get_input_tensor_by_name):
        setattr(made, thing.__name__, thing)
    return made


def make_request(config: ModelConfig, **values: Any) -> Request:
    """A request that Triton would let through: declared names, types and shapes only."""
    tensors = {}
    declared = {tensor.name: tensor for tensor in config.input}
    for name, value in values.items():
        array = np.atleast_1d(np.asarray(value)).astype(_dtype(declared[name]))
        _check_dims(declared[name], array)
        tensors[name] = Tensor(name, array)
    missing = {t.name for t in config.input if not t.optional} - set(tensors)
    assert not missing, missing
    return Request(tensors)


def check_response(config: ModelConfig, response: InferenceResponse) -> dict[str, np.ndarray]:
    """The outputs of `response` by name, as declared in `config`."""
    assert response.error is None, response.error
    declared = {tensor.name: tensor for tensor in config.output}
    outputs = {tensor.name: tensor.value for tensor in response.output_tensors}
    assert set(outputs) == set(declared)
    for name, array in outputs.items():
        assert array.dtype == _dtype(declared[name]), name
        _check_dims(declared[name], array)
    return outputs


def _dtype(declared: Any) -> np.dtype:
    name = type(declared).DESCRIPTOR.fields_by_name["data_type"].enum_type
    return np.dtype(triton_to_np_dtype(_wire(name.values_by_number[declared.data_type].name)))


def _wire(name: str) -> str:
    """The name of a type in requests: TYPE_STRING travels as BYTES."""
    return {"TYPE_STRING": "BYTES"}.get(name, name.removeprefix("TYPE_"))


def _check_dims(declared: Any, array: np.ndarray) -> None:
    assert array.ndim == len(declared.dims), declared.name
    for size, expected in zip(array.shape, declared.dims, strict=True):
        assert expected in (-1, size), declared.name
