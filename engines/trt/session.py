"""TensorRT as a session: CUDA tensors bound by address, nothing copied, nothing synchronised."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cspd.engines.build_report import profile_shapes
from cspd.engines.bundle import Bundle
from cspd.engines.errors import BundleError, CspdError
from cspd.engines.sessions.interface import CallCheck, Declared, Expected, check_interface
from cspd.engines.spec import GraphSpec
from cspd.engines.trt.load import EngineFile, LoadedEngine, Placement, load_engine
from cspd.engines.words import setting

PLACEHOLDER_BYTES = 256
# Types of TensorRT that a contract knows.
TYPES = {"FLOAT": "float32", "INT32": "int32"}


class Streams(Protocol):
    """Where work is queued; the CUDA streams of torch, or a stand-in."""

    def current(self, device: torch.device) -> int:
        """Handle of the stream that torch uses on `device` now."""
        ...


class TorchStreams:
    """The current CUDA stream of torch: engines and torch's own kernels follow each other there.

    Put the whole generation on a stream of its own with `torch.cuda.stream`: TensorRT synchronises
    more than it has to on the default one.
    """

    def current(self, device: torch.device) -> int:
        """Handle of the current stream."""
        return torch.cuda.current_stream(device).cuda_stream


def open_rtx_session(bundle: Bundle, label: str, *, device: str, threads: int) -> TrtSession:
    """Session of graph `label` on its tensorrt-rtx engine; `threads` has no meaning here."""
    return _open(bundle, label, "tensorrt-rtx", device)


def open_tensorrt_session(bundle: Bundle, label: str, *, device: str, threads: int) -> TrtSession:
    """Session of graph `label` on its tensorrt engine; `threads` has no meaning here."""
    return _open(bundle, label, "tensorrt", device)


class TrtSession:
    """One engine with its own output buffers, which grow to the largest shapes that it was given.

    Inputs are read where they lie and must be on `device`. Outputs are views of buffers that the
    next call overwrites; a call is put on torch's current stream and returns before it has run.
    """

    def __init__(
        self,
        spec: GraphSpec,
        loaded: LoadedEngine,
        *,
        device: torch.device,
        streams: Streams | None = None,
    ) -> None:
        """Make a context; BundleError if the engine has another contract or profile."""
        self.spec, self.device, self.loaded = spec, device, loaded
        self._context = loaded.new_context()
        self._streams = TorchStreams() if streams is None else streams
        _check_engine(spec, loaded.engine)
        self._check = CallCheck(spec)
        # The call whose output shapes the context has confirmed last.
        self._confirmed: Expected | None = None
        self._buffers: dict[str, Tensor] = {}
        # TensorRT wants an address even for an empty tensor, and a different one for each.
        self._placeholders = {
            t.name: torch.empty(PLACEHOLDER_BYTES, dtype=torch.uint8, device=device)
            for t in spec.inputs
        }
        self._bound: dict[str, Tensor] = {}

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Queue one run. CspdError if a tensor leaves the profile or lies on another device."""
        expected = self._check.inputs(tensors)
        self._bind(tensors)
        if expected is not self._confirmed:
            self._confirm(expected)
        for name, (dtype, shape) in expected.items():
            self._make_room(name, dtype, shape.numel())
        stream = self._streams.current(self.device)
        self._accept(self._context.execute_async_v3(stream), "run")
        return {
            name: self._buffers[name][: shape.numel()].view(shape)
            for name, (_, shape) in expected.items()
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as good as it could be, from the loading of the engine."""
        return self.loaded.notes

    def save_cache(self) -> None:
        """Store the kernels compiled so far, so that the next start is fast (tensorrt-rtx)."""
        self.loaded.save_cache()

    def fork(self) -> TrtSession:
        """A session of the same engine with a context and outputs of its own.

        A CUDA graph holds the state of the context it was captured from, which therefore must not
        see other shapes: each captured graph gets a fork. Forks must not run at the same time.
        """
        return TrtSession(self.spec, self.loaded, device=self.device, streams=self._streams)

    def capture_refusal(self) -> str | None:
        """Why this engine cannot be captured in a CUDA graph; None if it is worth trying."""
        return None if self.spec.capturable else f"{self.spec.name} holds a loop"

    def _bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Hand over shapes and addresses; the tensors are kept until the next call."""
        for name, tensor in tensors.items():
            if tensor.device != self.device:
                raise CspdError(
                    f"{self.spec.name}: {name} lies on {tensor.device}, expected {self.device}"
                )
            tensor = tensor.contiguous()
            self._bound[name] = tensor
            memory = tensor if tensor.numel() else self._placeholders[name]
            shape = tuple(tensor.shape)
            self._accept(self._context.set_input_shape(name, shape), f"{name} {list(shape)}")
            self._accept(
                self._context.set_tensor_address(name, memory.data_ptr()), f"address of {name}"
            )

    def _confirm(self, expected: Expected) -> None:
        """BundleError if the bound inputs make outputs that do not fit into their buffers."""
        for name, (_, shape) in expected.items():
            found = tuple(self._context.get_tensor_shape(name))
            if found != shape:
                self._check.refuse(name, str(list(found)), expected)
        self._confirmed = expected

    def _accept(self, done: bool, what: str) -> None:
        if not done:
            raise CspdError(
                f"{self.spec.name}: TensorRT refuses {what}; "
                "run cspd-run doctor, and rebuild the engine with cspd-export build"
            )

    def _make_room(self, name: str, dtype: torch.dtype, count: int) -> None:
        """Give an output a buffer for `count` numbers, unless it has one.

        Not for the largest shape of the profile: a fork that a CUDA graph holds sees one shape, and
        a table of modulations may take a gigabyte.
        """
        held = self._buffers.get(name)
        if held is None or held.numel() < count:
            buffer = torch.empty(max(count, 1), dtype=dtype, device=self.device)
            self._buffers[name] = buffer
            self._accept(
                self._context.set_tensor_address(name, buffer.data_ptr()), f"address of {name}"
            )


def _open(bundle: Bundle, label: str, flavour: str, device: str) -> TrtSession:
    record = bundle.graph(label)
    built = record.engines.get(flavour)
    if built is None:
        raise BundleError(
            f"{bundle.folder}: {label} has no {flavour} engine; "
            f"build it with: {bundle.engine_command(flavour)}"
        )
    where = _cuda_device(flavour, device)
    sha256 = bundle.manifest.files[built.file].sha256
    file = EngineFile(bundle.folder / built.file, flavour, built.version, sha256, built.gpu)
    gpu = torch.cuda.get_device_name(where)
    loaded = load_engine(file, Placement(where, gpu, record.spec.capturable, _cache_dir()))
    return TrtSession(record.spec, loaded, device=where)


def _cuda_device(flavour: str, device: str) -> torch.device:
    if not device.startswith("cuda"):
        raise CspdError(
            f"{setting('device')}: {flavour} runs on a GPU, got {device}; "
            f"use {setting('device', 'cuda')}"
        )
    if not torch.cuda.is_available():
        raise CspdError(
            f"{setting('backend', flavour)}: torch sees no GPU; run cspd-run doctor, or use "
            f"{setting('backend', 'onnxruntime')}"
        )
    where = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if where.index is None else where


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cspd"


def _check_engine(spec: GraphSpec, engine: Any) -> None:
    """The engine has exactly the tensors of the contract, and its profile covers their ranges."""
    groups: dict[str, list[Declared]] = {"INPUT": [], "OUTPUT": []}
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        kind = engine.get_tensor_dtype(name).name
        sizes = tuple(None if size < 0 else size for size in engine.get_tensor_shape(name))
        declared = Declared(name, TYPES.get(kind, kind), sizes)
        groups[engine.get_tensor_mode(name).name].append(declared)
    check_interface(spec, groups["INPUT"], groups["OUTPUT"])
    remedy = "rebuild it with cspd-export build"
    for name, (low, _, high) in profile_shapes(spec).items():
        if engine.get_tensor_location(name).name != "DEVICE":
            raise BundleError(f"{spec.name}: the engine reads {name} on the host; {remedy}")
        built_low, _, built_high = (tuple(s) for s in engine.get_tensor_profile_shape(name, 0))
        fits = all(a <= b for a, b in zip(built_low, low, strict=True))
        fits = fits and all(a >= b for a, b in zip(built_high, high, strict=True))
        if not fits:
            raise BundleError(
                f"{spec.name}: the engine takes {name} in {list(built_low)}..{list(built_high)}, "
                f"the bundle promises {list(low)}..{list(high)}; {remedy}"
            )
