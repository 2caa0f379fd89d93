"""Which backend runs a graph: a name from the command line to an open session.

A backend is imported when it is first used, so that a plain CPU run pulls in no GPU library.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.session import Session

# Backends that run engines, which hold no graph with `GraphSpec.engines` off.
ENGINES = ("tensorrt", "tensorrt-rtx")


class OpenSession(Protocol):
    """Opens the session of one graph of a bundle."""

    def __call__(self, bundle: Bundle, label: str, *, device: str, threads: int) -> Session:
        """Open the session of graph `label`."""
        ...


# Where each backend opens a session. PyTorch needs the model code, which stands above this floor
# and is reached by name only.
BACKENDS = {
    "onnxruntime": "cspd.engines.ort_session:open_session",
    "torch": "cspd.export.torch_session:open_session",
    "tensorrt-rtx": "cspd.engines.trt_session:open_rtx_session",
    "tensorrt": "cspd.engines.trt_session:open_tensorrt_session",
}


def check_backend(name: str) -> None:
    """Raise CspdError unless there is a backend of this name."""
    if name not in BACKENDS:
        raise CspdError(f"backend {name!r:.60} is unknown, expected one of {', '.join(BACKENDS)}")


def open_session(
    bundle: Bundle, label: str, backend: str, *, device: str = "cpu", threads: int = 0
) -> Session:
    """Session of graph `label`, such as "target/backbone"; `threads` 0 leaves it to the backend."""
    check_backend(backend)
    module, _, function = BACKENDS[backend].partition(":")
    opener = cast(OpenSession, getattr(importlib.import_module(module), function))
    return opener(bundle, label, device=device, threads=threads)
