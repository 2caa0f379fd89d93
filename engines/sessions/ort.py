"""Sessions of ONNX Runtime: CPU by default, CUDA with I/O binding and no copies."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cspd.engines.bundle import Bundle
from cspd.engines.cpus import available_cpus
from cspd.engines.errors import CspdError, MissingExtraError
from cspd.engines.sessions.interface import CallCheck, Declared, check_interface
from cspd.engines.sessions.session import Session, torch_device
from cspd.engines.sessions.split import SplitSession
from cspd.engines.spec import GraphSpec

# Types of ONNX Runtime that a contract knows.
TYPES = {"tensor(float)": "float32", "tensor(int32)": "int32"}


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module, or an error that names the extra to install."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    return onnxruntime


# Weights in all single-threaded copies of one graph together; a larger model runs as one session
# whose products are cut up by ONNX Runtime.
COPIES_BYTES = 256 << 20


def open_session(bundle: Bundle, label: str, *, device: str, threads: int) -> Session:
    """Open the graph `label` of `bundle` on `device`, "cpu" or "cuda".

    On the CPU a small model runs as one session per thread, see `split_session`.
    """
    path, spec = str(bundle.graph_file(label)), bundle.graph(label).spec
    threads = threads or available_cpus()
    copies = min(threads, COPIES_BYTES // max(bundle.weight_bytes(label), 1))
    if device == "cuda" or copies < 2:
        return ort_session(path, spec, device, threads)
    if spec.independent is None:
        return ort_session(path, spec, device, 1)
    return SplitSession(spec, [ort_session(path, spec, device, 1) for _ in range(copies)])


def ort_session(path: str, spec: GraphSpec, device: str = "cpu", threads: int = 0) -> Session:
    """Open the ONNX file `path` with contract `spec`; `threads` 0: as many as CPUs are granted.

    BundleError if the graph does not have the inputs and outputs of `spec`.
    """
    ort = import_onnxruntime()
    options = thread_options(ort, threads)
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in ort.get_available_providers():
        raise CspdError(
            f"onnxruntime {ort.__version__} has no {provider}; "
            "install the GPU build in its place: pip uninstall --yes onnxruntime && "
            "pip install 'cspd[gpu]'"
        )
    if not _is_text(path):
        raise CspdError(
            f"{path}: onnxruntime opens only paths in UTF-8; rename the folder, or copy the bundle"
        )
    try:
        session = ort.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # the library raises its own, undocumented types
        raise CspdError(f"{path}: onnxruntime cannot load it: {error}") from error
    if torch_device(device).type == "cuda":
        return OrtBoundSession(session, spec, torch_device(device))
    return OrtCpuSession(session, spec)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def thread_options(ort: ModuleType, threads: int = 0) -> Any:
    """Session options with an explicit number of threads, by default one per available CPU.

    Left to itself, ONNX Runtime takes every core of the machine and pins its threads to them.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads of several sessions, and torch beside them, would starve each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _check_graph(session: Any, spec: GraphSpec) -> None:
    """Raise BundleError unless the loaded graph has the inputs and outputs of `spec`."""
    inputs, outputs = (
        [Declared(n.name, TYPES.get(n.type, n.type), _sizes(n.shape)) for n in nodes]
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    check_interface(spec, inputs, outputs)


def _sizes(shape: list[int | str | None]) -> tuple[int | None, ...]:
    """Sizes that ONNX Runtime knows; names of axes say nothing."""
    return tuple(size if isinstance(size, int) else None for size in shape)


class OrtCpuSession:
    """ONNX Runtime on the CPU; tensors are handed over and taken back without copies."""

    device = torch.device("cpu")

    def __init__(self, session: Any, spec: GraphSpec) -> None:
        _check_graph(session, spec)
        self.spec = spec
        self._session, self._check = session, CallCheck(spec)
        self._outputs = [tensor.name for tensor in spec.outputs]

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run the graph once."""
        expected = self._check.inputs(tensors)
        inputs = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
        try:
            results = self._session.run(self._outputs, inputs)
        except Exception as error:  # the library raises its own, undocumented types
            raise CspdError(f"{self.spec.name}: onnxruntime cannot run it: {error}") from error
        outputs = {
            name: torch.from_numpy(value)
            for name, value in zip(self._outputs, results, strict=True)
        }
        return self._check.outputs(outputs, expected)


class OrtBoundSession:
    """ONNX Runtime with tensors bound where they lie: on CUDA nothing passes through the host."""

    def __init__(self, session: Any, spec: GraphSpec, device: torch.device) -> None:
        _check_graph(session, spec)
        self.spec, self.device = spec, device
        self._session, self._check = session, CallCheck(spec)
        # ONNX Runtime wants an address even for an empty tensor.
        self._placeholder = torch.empty(1, device=device)

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run the graph once."""
        expected = self._check.inputs(tensors)
        binding = self._session.io_binding()
        held = {name: self._on_device(name, tensor) for name, tensor in tensors.items()}
        outputs = {
            name: torch.empty(shape, dtype=dtype, device=self.device)
            for name, (dtype, shape) in expected.items()
        }
        for bind, group in ((binding.bind_input, held), (binding.bind_output, outputs)):
            for name, tensor in group.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                address = (tensor if tensor.numel() else self._placeholder).data_ptr()
                index = self.device.index or 0
                bind(name, self.device.type, index, dtype, tuple(tensor.shape), address)
        if self.device.type == "cuda":
            # torch and ONNX Runtime use different streams.
            torch.cuda.current_stream().synchronize()
        # ONNX Runtime writes a result only into memory that was bound with exactly its shape.
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the library raises its own, undocumented types
            raise CspdError(f"{self.spec.name}: onnxruntime cannot run it: {error}") from error
        return outputs

    def _on_device(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.device.type != self.device.type:
            raise CspdError(
                f"{self.spec.name}: {name} lies on {tensor.device}, expected {self.device}"
            )
        return tensor.contiguous()
