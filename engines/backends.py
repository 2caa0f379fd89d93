"""Which backend runs a graph: a name from the command line to an open session.

A backend is imported when it is first used, so that a plain CPU run pulls in no GPU library.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.sessions.session import Session


class OpenSession(Protocol):
    """Opens the session of one graph of a bundle."""

    def __call__(self, bundle: Bundle, label: str, *, device: str, threads: int) -> Session:
        """Open the session of graph `label`."""
        ...


@dataclass(frozen=True)
class Backend:
    """What runs graphs, by its properties; `opens` is where, as "module:function".

    `engines`: it runs engine files, which hold no graph with `GraphSpec.engines` off. `loops_on`:
    kinds of devices on which a graph with a loop inside is its fastest way through a chain;
    elsewhere the steps are recorded as a CUDA graph. `makes_graphs`: it makes every graph of a
    model from its weights, whether the bundle has that graph or not.
    """

    opens: str
    engines: bool = False
    loops_on: tuple[str, ...] = ()
    makes_graphs: bool = False


# PyTorch needs the model code, which stands above this floor and is reached by name only.
BACKENDS = {
    "onnxruntime": Backend("cspd.engines.sessions.ort:open_session", loops_on=("cpu", "cuda")),
    "torch": Backend(
        "cspd.export.torch_session:open_session", loops_on=("cpu",), makes_graphs=True
    ),
    "tensorrt-rtx": Backend("cspd.engines.trt.session:open_rtx_session", engines=True),
    "tensorrt": Backend("cspd.engines.trt.session:open_tensorrt_session", engines=True),
}
ENGINES = tuple(name for name in ("tensorrt", "tensorrt-rtx") if BACKENDS[name].engines)


def check_backend(name: str) -> None:
    """Raise CspdError unless there is a backend of this name."""
    if name not in BACKENDS:
        raise CspdError(f"backend {name!r:.60} is unknown, expected one of {', '.join(BACKENDS)}")


def open_session(
    bundle: Bundle, label: str, backend: str, *, device: str = "cpu", threads: int = 0
) -> Session:
    """Session of graph `label`, such as "target/backbone"; `threads` 0 leaves it to the backend."""
    check_backend(backend)
    module, _, function = BACKENDS[backend].opens.partition(":")
    opener = cast(OpenSession, getattr(importlib.import_module(module), function))
    return opener(bundle, label, device=device, threads=threads)
