"""Loading of engines. An engine is native code: its hash decides, before anything looks inside."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cspd.engines.atomic import atomic_file
from cspd.engines.errors import BundleError, CspdError
from cspd.engines.trt.api import import_trt, one_line, trt_log


@dataclass(frozen=True)
class EngineFile:
    """A serialized engine and what the manifest says about it; `gpu` is the one it was built on."""

    path: Path
    flavour: str
    version: str
    sha256: str
    gpu: str | None = None

    @property
    def remedy(self) -> str:
        """How to get an engine that loads."""
        return f"rebuild it with: cspd-export build --backend {self.flavour}"


@dataclass(frozen=True)
class Placement:
    """Where and how an engine will run.

    `gpu` is the model name of `device`. `capturable` engines get their working memory from torch,
    so that CUDA graphs can hold them. `cache_dir`, private to the user, keeps compiled kernels
    per engine and GPU model (tensorrt-rtx only).
    """

    device: torch.device
    gpu: str
    capturable: bool
    cache_dir: Path | None = None


@dataclass(frozen=True)
class LoadedEngine:
    """An engine ready to run.

    `new_context` makes an execution context; all contexts of an engine share their working memory,
    so that only one may run at a time. `notes` tells what is not as good as it could be.
    `save_cache` stores the kernels that tensorrt-rtx compiled, so that the next start is fast.
    """

    engine: Any
    new_context: Callable[[], Any]
    notes: tuple[str, ...] = ()
    save_cache: Callable[[], None] = lambda: None


def load_engine(file: EngineFile, placement: Placement) -> LoadedEngine:
    """Load the engine of `file` where `placement` says.

    Raises BundleError for a file that is not the manifest's, or an engine for another version or
    GPU; CspdError if the GPU has no memory for it.
    """
    blob = _read(file)
    trt = import_trt(file.flavour)
    if file.version != trt.__version__:
        raise BundleError(
            f"{file.path.name}: built with {file.flavour} {file.version}, "
            f"{trt.__version__} is installed; {file.remedy}"
        )
    log = trt_log(file.flavour)
    with log.collect() as messages:
        runtime = trt.Runtime(log.logger)
        runtime.engine_host_code_allowed = False
        notes = _check_validity(trt, runtime, blob, file, messages)
        engine = runtime.deserialize_cuda_engine(blob)
        if engine is None:
            built = f"built on {file.gpu}, this is {placement.gpu}: " if file.gpu else ""
            raise BundleError(
                f"{file.path.name}: TensorRT cannot load it ({built}{one_line(messages)}); "
                f"{file.remedy}"
            )
    loaded = _configure(trt, engine, file, placement)
    return replace(loaded, notes=notes + loaded.notes)


def _read(file: EngineFile) -> bytes:
    """Content of the file, once its hash is that of the manifest.

    Read first and hashed then: what is loaded is what was hashed, whatever happens to the file.
    """
    try:
        blob = file.path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{file.path}: cannot be read ({error.strerror}); {file.remedy}"
        ) from None
    if hashlib.sha256(blob).hexdigest() != file.sha256:
        raise BundleError(
            f"{file.path}: differs from the hash in the manifest and is not loaded; {file.remedy}"
        )
    return blob


def _check_validity(
    trt: ModuleType, runtime: Any, blob: bytes, file: EngineFile, messages: list[str]
) -> tuple[str, ...]:
    """Notes on an engine that may be loaded; only tensorrt-rtx can tell beforehand."""
    if not hasattr(runtime, "get_engine_validity"):
        return ()
    validity, found = runtime.get_engine_validity(blob)
    flags = trt.EngineInvalidityDiagnostics.__members__
    reasons = ", ".join(name for name, flag in flags.items() if int(flag) & int(found))
    if validity == trt.EngineValidity.INVALID:
        raise BundleError(
            f"{file.path.name}: does not run on this machine "
            f"({reasons or 'no GPU or driver found, see cspd-run doctor'}: "
            f"{one_line(messages)}); {file.remedy}"
        )
    if validity == trt.EngineValidity.SUBOPTIMAL:
        return (f"{file.path.name}: runs, but slower than it could ({reasons}); {file.remedy}",)
    return ()


def _configure(
    trt: ModuleType, engine: Any, file: EngineFile, placement: Placement
) -> LoadedEngine:
    """How contexts of `engine` are made: kernels compiled and memory given as `placement` says."""
    strategies = trt.ExecutionContextAllocationStrategy
    how = strategies.USER_MANAGED if placement.capturable else strategies.STATIC
    loaded = LoadedEngine(engine, lambda: None)
    if hasattr(engine, "create_runtime_config"):
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(how)
        if placement.capturable:
            # A graph captured before the specialised kernels are ready would keep the slow ones.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        if placement.cache_dir is not None:
            path = placement.cache_dir / _cache_name(file, placement.gpu)
            loaded = _attach_cache(loaded, config, path)
        how = config
    memory = _working_memory(engine, placement)

    def new_context() -> Any:
        context = engine.create_execution_context(how)
        if context is None:
            raise CspdError(f"{file.path.name}: the GPU has no memory for it; lower --max-batch")
        if memory is not None:
            context.set_device_memory(memory.data_ptr(), memory.numel())
        return context

    return replace(loaded, new_context=new_context)


def _working_memory(engine: Any, placement: Placement) -> Tensor | None:
    """Memory for the largest shapes, owned by torch; None if TensorRT is to see to it itself."""
    if not placement.capturable:
        return None
    size = max(engine.device_memory_size_v2, 1)
    return torch.empty(size, dtype=torch.uint8, device=placement.device)


def _cache_name(file: EngineFile, gpu: str) -> str:
    """One file per engine, TensorRT version and GPU model; big shared ones are slow to load."""
    model = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"{file.sha256[:16]}-{file.version}-{model}.cache"


def _attach_cache(loaded: LoadedEngine, config: Any, path: Path) -> LoadedEngine:
    """`loaded` with the compiled kernels in `path`, if they fit, and a way to save new ones."""
    cache = config.create_runtime_cache()
    notes = loaded.notes
    if path.is_file() and not cache.deserialize(path.read_bytes()):
        notes += (f"{path}: made for another GPU, driver or version; kernels are compiled again",)
    config.set_runtime_cache(cache)

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_file(path) as file:
            file.write(memoryview(cache.serialize()))

    return replace(loaded, notes=notes, save_cache=save)
