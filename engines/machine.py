"""Whether a backend can run a bundle on this machine: libraries, device, engines for this GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from cspd.engines.backends import ENGINES, check_backend
from cspd.engines.bundle import Bundle
from cspd.engines.console.preflight import Check
from cspd.engines.errors import BundleError
from cspd.engines.sessions.ort import import_onnxruntime
from cspd.engines.sessions.session import torch_device
from cspd.engines.trt.api import import_trt


def check_machine(bundle: Bundle, backend: str, device: str) -> None:
    """Raise CspdError with the first thing that keeps `backend` from running `bundle` here.

    Opens no graph.
    """
    for check in machine_checks(bundle, backend, device):
        check()


def machine_checks(bundle: Bundle, backend: str, device: str) -> Iterator[Check]:
    """What `backend` needs to run `bundle` on `device`, one check each."""
    yield partial(check_backend, backend)
    yield partial(torch_device, device)
    if backend in ENGINES:
        yield partial(_check_engines_here, bundle, backend)
    elif backend == "onnxruntime":
        yield import_onnxruntime


def check_engines(bundle: Bundle, flavour: str, version: str, capability: str | None) -> None:
    """Raise BundleError unless `bundle` holds engines of TensorRT `version` for this GPU.

    `capability` is the GPU's, such as "8.9"; None without a GPU. An engine that names none is
    looked at when it is loaded: it is for every GPU of tensorrt-rtx, or for that of its build.
    """
    command = bundle.engine_command(flavour)
    remedy = f"rebuild them with: {command}"
    for label, graph in bundle.manifest.graphs().items():
        if not graph.spec.engines:
            continue
        built = graph.engines.get(flavour)
        if built is None:
            raise BundleError(
                f"{bundle.folder}: {label} has no {flavour} engine; build it with: {command}"
            )
        if built.version != version:
            raise BundleError(
                f"{bundle.folder}: engines were built with {flavour} {built.version}, {version} is "
                f"installed; {remedy}"
            )
        known = built.compute_capabilities if flavour == "tensorrt-rtx" else ()
        if capability and known and capability not in known:
            raise BundleError(
                f"{bundle.folder}: engines are for compute capability {', '.join(known)}, this "
                f"GPU has {capability}; {remedy} --compute-capability {capability}"
            )


def _check_engines_here(bundle: Bundle, flavour: str) -> None:
    capability = None
    if torch.cuda.is_available():
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
    check_engines(bundle, flavour, import_trt(flavour).__version__, capability)
