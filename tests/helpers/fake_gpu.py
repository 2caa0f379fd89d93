"""A stand-in for TensorRT's run time that reads and writes the addresses it is given.

ONNX Runtime computes what the engine would. Everything that TensorRT requires of its caller is
checked here: shapes inside the profile, an address for every tensor that differs from all others,
a stream, and no other context at work in the shared memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import onnxruntime

from cspd.engines.build_report import profile_shapes
from cspd.engines.spec import GraphSpec, TensorSpec


class Graph(Protocol):
    """What an engine is made of: an ONNX file and its contract."""

    path: Path
    spec: GraphSpec


NUMPY = {"float32": np.float32, "int32": np.int32}
TRT_TYPES = {
    "tensor(float)": "FLOAT", "tensor(int32)": "INT32", "tensor(int64)": "INT64",
    "tensor(float16)": "HALF", "tensor(bool)": "BOOL",
}  # fmt: skip


class FakeEngine:
    """The surface of ICudaEngine that a session uses. `log`: runs as (context, stream)."""

    def __init__(self, graph: Graph) -> None:
        self.spec = graph.spec
        self.profile = profile_shapes(graph.spec)
        self.names = [t.name for t in (*graph.spec.inputs, *graph.spec.outputs)]
        self.location = "DEVICE"
        self.log: list[tuple[int, int]] = []
        self.contexts: list[FakeContext] = []
        self._inferred: dict[tuple, dict[str, list[int]]] = {}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.network = onnxruntime.InferenceSession(graph.path, options)

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        is_input = name in {t.name for t in self.spec.inputs}
        return SimpleNamespace(name="INPUT" if is_input else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=TRT_TYPES[self._node(name).type])

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self._node(name).shape]

    def _node(self, name: str) -> Any:
        nodes = (*self.network.get_inputs(), *self.network.get_outputs())
        unknown = SimpleNamespace(type="tensor(float)", shape=[])
        return next((node for node in nodes if node.name == name), unknown)

    def get_tensor_location(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.location)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list:
        assert profile == 0
        return [list(shape) for shape in self.profile[name]]

    def output_shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
        """What inputs of the given shapes lead to; told by a run."""
        key = tuple(sorted(shapes.items()))
        if key not in self._inferred:
            zeros = {t.name: np.zeros(shapes[t.name], NUMPY[t.dtype]) for t in self.spec.inputs}
            names = [node.name for node in self.network.get_outputs()]
            results = self.network.run(names, zeros)
            shown = {n: list(r.shape) for n, r in zip(names, results, strict=True)}
            self._inferred[key] = shown
        return self._inferred[key]

    def new_context(self) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    """The surface of IExecutionContext that the session uses."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profile[name]
        inside = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if inside:
            self.shapes[name] = shape
        return inside

    def get_tensor_shape(self, name: str) -> list[int]:
        """Shape of an output, which follows from those of the inputs."""
        return self.engine.output_shapes(self.shapes)[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self.engine.names
        self.addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle, "a stream is a handle, and the default one is refused"
        assert set(self.addresses) == set(self.engine.names), "a tensor has no address"
        assert len(set(self.addresses.values())) == len(self.addresses), "an address serves twice"
        assert set(self.shapes) == {t.name for t in self.engine.spec.inputs}
        feeds = {t.name: self._read(t) for t in self.engine.spec.inputs}
        names = [t.name for t in self.engine.spec.outputs]
        results = self.engine.network.run(names, feeds)
        for name, result in zip(names, results, strict=True):
            ctypes.memmove(self.addresses[name], result.ctypes.data, result.nbytes)
        self.engine.log.append((self.engine.contexts.index(self), stream_handle))
        return True

    def _read(self, tensor: TensorSpec) -> np.ndarray:
        """A copy of what lies at the tensor's address."""
        array = np.empty(self.shapes[tensor.name], NUMPY[tensor.dtype])
        ctypes.memmove(array.ctypes.data, self.addresses[tensor.name], array.nbytes)
        return array


class FakeStreams:
    """A current stream that tests can change."""

    def __init__(self) -> None:
        self.handle = 77

    def current(self, device: object) -> int:
        return self.handle


class FakeGraphs:
    """Replays by calling the work again, on the tensors it was captured with."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.captures = 0
        self.replaying = False
        self._fail = fail

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._fail is not None:
            raise self._fail
        self.captures += 1
        work()

        def replay() -> None:
            self.replaying = True
            work()
            self.replaying = False

        return replay
