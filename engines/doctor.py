"""What this machine can do, and the command that fixes each thing it cannot. Never raises."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from cspd.engines.errors import CspdError
from cspd.engines.spec import Record
from cspd.engines.trt.api import import_trt, supported_capabilities

BACKENDS = ("torch", "onnxruntime", "tensorrt-rtx", "tensorrt")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # both write the module onnxruntime
INSTALL_DRIVER = "sudo ubuntu-drivers install"


class Check(Record):
    """One line of the report. `fix` is the command that helps; None where nothing is wrong."""

    subject: str
    found: str
    ok: bool
    fix: str | None = None


class BackendReport(Record):
    """What one backend can do here: `builds` engines, `runs` on the CPU or the GPUs listed."""

    name: Literal["torch", "onnxruntime", "tensorrt-rtx", "tensorrt"]
    builds: bool
    runs: bool
    reason: str
    fix: str | None = None


class Gpu(Record):
    """One GPU that torch sees."""

    name: str
    capability: str
    memory_bytes: int


class Diagnosis(Record):
    """Everything `cspd-run doctor --json` prints."""

    schema_version: Literal[1] = 1
    checks: tuple[Check, ...]
    gpus: tuple[Gpu, ...]
    backends: tuple[BackendReport, ...]

    def runs(self, backend: str) -> bool:
        """True if `backend` can run here; decides the command's exit code."""
        return any(report.runs for report in self.backends if report.name == backend)


def diagnose() -> Diagnosis:
    """Look at Python, the libraries, the driver and the GPUs."""
    gpus = _gpus()
    checks = [
        Check(subject="python", found=platform.python_version(), ok=sys.version_info >= (3, 11)),
        _guard("torch", _torch),
        _guard("nvidia driver", _driver),
        _guard("gpu", lambda: _gpu_check(gpus)),
        _guard("onnxruntime", _onnxruntime),
        _guard("onnx", lambda: _library("onnx", "export")),
        _guard("tensorrt-rtx", lambda: _tensorrt("tensorrt-rtx")),
        _guard("tensorrt", lambda: _tensorrt("tensorrt")),
    ]
    by_subject = {check.subject: check for check in checks}
    backends = tuple(_backend(name, by_subject, gpus) for name in BACKENDS)
    return Diagnosis(checks=tuple(checks), gpus=gpus, backends=backends)


def _guard(subject: str, look: Callable[[], Check]) -> Check:
    """The result of `look`; a library that breaks under the look is a finding, not a crash."""
    try:
        return look()
    except Exception as error:
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        fix = f"pip install --force-reinstall {subject}"
        return Check(subject=subject, found=found, ok=False, fix=fix)


def _torch() -> Check:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Check(subject="torch", found=f"{torch.__version__} ({built})", ok=True)


def _gpus() -> tuple[Gpu, ...]:
    try:
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except RuntimeError:  # a driver too old for this torch: the line about GPUs says so
        return ()
    return tuple(
        Gpu(name=g.name, capability=f"{g.major}.{g.minor}", memory_bytes=g.total_memory)
        for g in found
    )


def _driver() -> Check:
    version = _driver_version()
    if version is None:
        return Check(subject="nvidia driver", found="none", ok=False, fix=INSTALL_DRIVER)
    return Check(subject="nvidia driver", found=version, ok=True)


def _driver_version() -> str | None:
    if DRIVER_FILE.is_file():
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER_FILE.read_text())
        if found:
            return found[0]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def _gpu_check(gpus: tuple[Gpu, ...]) -> Check:
    if gpus:
        names = ", ".join(f"{gpu.name} ({gpu.capability})" for gpu in gpus)
        return Check(subject="gpu", found=names, ok=True)
    if torch.version.cuda is None:
        fix = "pip install --force-reinstall torch"
        found = "none seen: this torch has no CUDA"
    else:
        fix, found = "nvidia-smi", "none seen by torch"
    return Check(subject="gpu", found=found, ok=False, fix=fix)


def _onnxruntime() -> Check:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return _missing("onnxruntime", "cpu")
    both = [name for name in RUNTIMES if _version(name)]
    if len(both) > 1:
        found = " and ".join(f"{name} {_version(name)}" for name in both)
        fix = f"pip uninstall --yes {' '.join(both)} && pip install {both[-1]}"
        return Check(
            subject="onnxruntime", ok=False, fix=fix,
            found=f"{found} are installed over each other; keep one",
        )  # fmt: skip
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in _providers())
    return Check(subject="onnxruntime", found=f"{onnxruntime.__version__} ({providers})", ok=True)


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _library(name: str, extra: str) -> Check:
    version = _version(name)
    return Check(subject=name, found=version, ok=True) if version else _missing(name, extra)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing(name: str, extra: str) -> Check:
    return Check(subject=name, found="missing", ok=False, fix=f"pip install 'cspd[{extra}]'")


def _tensorrt(flavour: str) -> Check:
    try:
        trt = import_trt(flavour)
    except CspdError as error:
        extra = "rtx" if flavour == "tensorrt-rtx" else "gpu"
        fix = f"pip install 'cspd[{extra}]'"
        return Check(subject=flavour, found=str(error).split(";")[0], ok=False, fix=fix)
    targets = ", ".join(supported_capabilities(trt)) or "the GPU it is built on"
    return Check(subject=flavour, found=f"{trt.__version__} (engines for {targets})", ok=True)


def _backend(name: str, checks: dict[str, Check], gpus: tuple[Gpu, ...]) -> BackendReport:
    """What `name` can do, from the checks alone."""
    if name == "torch":
        return _report(name, (False, True), "reference", None)
    library = checks[name]
    if not library.ok:
        return _report(name, (False, False), library.found, library.fix)
    if name == "onnxruntime":
        return _report(name, (True, True), library.found, None)
    gpu = checks["gpu"]
    builds = name == "tensorrt-rtx" or gpu.ok
    if not gpu.ok:
        return _report(name, (builds, False), f"no GPU: {gpu.found}", gpu.fix)
    targets = supported_capabilities(import_trt(name))
    if targets and not any(gpu.capability in targets for gpu in gpus):
        reason = f"{gpu.found} is none of {', '.join(targets)}"
        return _report(name, (builds, False), reason, "pip install 'cspd[gpu]'")
    return _report(name, (builds, True), gpu.found, None)


def _report(name: str, can: tuple[bool, bool], reason: str, fix: str | None) -> BackendReport:
    builds, runs = can
    return BackendReport.model_validate(
        {"name": name, "builds": builds, "runs": runs, "reason": reason, "fix": fix}
    )
