"""From ONNX to a TensorRT engine: one code path for TensorRT 10, 11 and TensorRT-RTX.

Networks are strongly typed, so that precision is what the exporter wrote and nothing else.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch

from cspd.engines.atomic import atomic_file
from cspd.engines.build_report import BuildReport, profile_shapes
from cspd.engines.errors import CspdError
from cspd.engines.memory import peak_memory, release_memory
from cspd.engines.spec import GraphSpec
from cspd.engines.trt.api import import_trt, last_words, parse_onnx, supported_capabilities, trt_log
from cspd.engines.trt.options import BuildOptions
from cspd.engines.trt.progress import ProgressCallback, make_monitor


def build_engine(
    onnx_path: Path,
    spec: GraphSpec,
    options: BuildOptions,
    out: Path,
    progress: ProgressCallback | None = None,
) -> BuildReport:
    """Build the engine of one graph into `out`, which appears complete or not at all.

    Weights outside `onnx_path` are found next to it. Raises CspdError with the parser's or the
    builder's own words. Everything TensorRT allocated is freed on return.
    """
    trt = check_buildable(options)
    if not onnx_path.is_file():
        raise CspdError(f"{spec.name}: {onnx_path} does not exist; export the graph first")
    start = time.perf_counter()
    with peak_memory() as peak:
        digest, size = _build(trt, onnx_path, spec, options, out, progress)
    release_memory()
    gpu, capabilities = None, options.compute_capabilities
    if options.flavour == "tensorrt":
        gpu = torch.cuda.get_device_name()
        capabilities = ("{}.{}".format(*torch.cuda.get_device_capability()),)
    return BuildReport(
        flavour=options.flavour,
        version=trt.__version__,
        compute_capabilities=capabilities,
        gpu=gpu,
        profile=profile_shapes(spec),
        sha256=digest,
        bytes=size,
        seconds=round(time.perf_counter() - start, 3),
        peak_memory_bytes=peak(),
    )


def check_buildable(options: BuildOptions) -> ModuleType:
    """The TensorRT module of `options`; raises CspdError unless it can build with them here."""
    trt = import_trt(options.flavour)
    if options.flavour == "tensorrt" and not torch.cuda.is_available():
        raise CspdError(
            "--backend tensorrt: builds on the GPU that the engine is for, and torch sees none; "
            "build there, or use --backend tensorrt-rtx, which needs no GPU (see cspd-run doctor)"
        )
    known = list(supported_capabilities(trt))
    unknown = set(options.compute_capabilities) - set(known)
    if unknown:
        raise CspdError(f"--compute-capability: got {sorted(unknown)}, expected some of {known}")
    return trt


def _build(
    trt: ModuleType,
    onnx_path: Path,
    spec: GraphSpec,
    options: BuildOptions,
    out: Path,
    progress: ProgressCallback | None,
) -> tuple[str, int]:
    """Build and write; returns SHA-256 and size. TensorRT's objects die with this frame."""
    log = trt_log(options.flavour)
    with atomic_file(out) as file, log.collect() as messages:
        sink = _sink_class(trt)(file)
        builder = trt.Builder(log.logger)
        network, _weights, errors = parse_onnx(trt, builder, log, onnx_path)
        if errors:
            raise CspdError(f"{onnx_path.name}: TensorRT cannot parse it:\n" + "\n".join(errors))
        _check_io(spec, network)
        config = _configure(trt, builder, spec, options)
        monitor = config.progress_monitor = make_monitor(trt, progress)
        done = _serialize(builder, network, config, sink)
        if monitor.failure is not None:
            raise monitor.failure
        if sink.failure is not None:
            reason = sink.failure.strerror
            raise CspdError(
                f"{out}: cannot be written ({reason}); make room or choose another --out"
            )
        if not done:
            raise CspdError(f"{spec.name}: TensorRT built no engine:\n" + last_words(messages))
    _save_timing_cache(config, options)
    return sink.digest.hexdigest(), sink.size


def _serialize(builder: Any, network: Any, config: Any, sink: Any) -> bool:
    """Build the engine into `sink`; False if the builder gave up."""
    # The stream takes pieces of 64 MiB and saves one copy of the engine in memory.
    if hasattr(builder, "build_serialized_network_to_stream"):
        return builder.build_serialized_network_to_stream(network, config, sink)
    engine = builder.build_serialized_network(network, config)
    return engine is not None and sink.write(memoryview(engine)) == engine.nbytes


def _sink_class(trt: ModuleType) -> type:
    """A stream writer of this module that hashes and counts what it writes to a file."""

    class Sink(getattr(trt, "IStreamWriter", object)):  # type: ignore[misc]
        def __init__(self, file: IO[bytes]) -> None:
            super().__init__()
            self.failure: OSError | None = None
            self.digest, self.size = hashlib.sha256(), 0
            self._file = file

        def write(self, data: Any) -> int:
            """Number of bytes taken. A full disk must not raise across TensorRT's frames."""
            try:
                self._file.write(data)
            except OSError as error:
                self.failure = error
                return 0
            self.digest.update(data)
            self.size += len(data)
            return len(data)

    return Sink


def _check_io(spec: GraphSpec, network: Any) -> None:
    found = {network.get_input(i).name for i in range(network.num_inputs)}
    expected = {tensor.name for tensor in spec.inputs}
    if found != expected:
        raise CspdError(
            f"{spec.name}: the ONNX file has inputs {sorted(found)}, expected {sorted(expected)}; "
            "export it again"
        )


def _configure(trt: ModuleType, builder: Any, spec: GraphSpec, options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, shapes in profile_shapes(spec).items():
        profile.set_shape(name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise CspdError(f"{spec.name}: TensorRT refuses the profile {profile_shapes(spec)}")
    config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    # TF32 is on by default and would make "fp32" a lie; NaN must reach the check at run time.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_flag(trt.BuilderFlag.STRICT_NANS)
    if spec.capturable and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # tensorrt-rtx then allocates nothing at run time, or fails to build: it can be captured.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    _target(trt, config, options)
    return config


def _target(trt: ModuleType, config: Any, options: BuildOptions) -> None:
    """GPUs, compatibility and timing cache."""
    known = supported_capabilities(trt)
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            config.set_compute_capability(known[capability], index)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # Otherwise the plan carries a runtime as native code, which loading refuses to run.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.timing_cache is not None:
        path = options.timing_cache
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        config.set_timing_cache(cache, False)


def _save_timing_cache(config: Any, options: BuildOptions) -> None:
    if options.timing_cache is not None:
        options.timing_cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.timing_cache) as file:
            file.write(memoryview(config.get_timing_cache().serialize()))
