"""TensorRT as a module: the one place that imports it, for both of its flavours.

`tensorrt-rtx` builds without a GPU and runs on RTX GPUs; `tensorrt` builds and runs on the GPU at
hand. Their Python modules have nearly the same surface; what only one has is looked up by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cspd.engines.errors import CspdError, MissingExtraError

# Flavour: module that holds it, extra of ours that installs it.
FLAVOURS = {"tensorrt-rtx": ("tensorrt_rtx", "rtx"), "tensorrt": ("tensorrt", "gpu")}
# Logged at every build on a machine without a GPU driver, where tensorrt-rtx builds all the same.
DRIVER_NOISE = ("cudaError 35", "Thread context has not been set")


def import_trt(flavour: str) -> ModuleType:
    """The TensorRT module of `flavour`, imported on first use.

    Raises MissingExtraError when it is not installed, CspdError when it is but cannot be loaded.
    """
    if flavour not in FLAVOURS:
        raise CspdError(f"TensorRT flavour: got {flavour!r}, expected one of {sorted(FLAVOURS)}")
    library, extra = FLAVOURS[flavour]
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name == library:
            raise MissingExtraError(library, extra) from None
        raise CspdError(f"{library} is installed but misses {error.name}: {error}") from None
    except (ImportError, OSError) as error:
        raise CspdError(f"{library} is installed but cannot be loaded: {error}") from None


class TrtLog:
    """What TensorRT says, kept so that an error can carry its last words.

    One per module and process: TensorRT holds on to the first logger it is given, for ever.
    """

    def __init__(self, trt: ModuleType) -> None:
        self._severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
        self._collectors: list[list[str]] = []
        self.logger = _logger_class(trt)(self._receive)

    @contextlib.contextmanager
    def collect(self) -> Iterator[list[str]]:
        """Gather the error messages logged inside the block, oldest first."""
        messages: list[str] = []
        self._collectors.append(messages)
        try:
            yield messages
        finally:
            # By identity: equal lists of nested blocks must not be taken for each other.
            self._collectors = [held for held in self._collectors if held is not messages]

    def _receive(self, severity: Any, message: str) -> None:
        if severity in self._severe:
            for messages in self._collectors:
                messages.append(message)


@functools.cache
def trt_log(flavour: str) -> TrtLog:
    """The log of `flavour` in this process."""
    return TrtLog(import_trt(flavour))


def last_words(messages: Iterable[str], limit: int = 4) -> str:
    """The last `limit` different messages, a line each, without those about a missing driver."""
    lines = [line.strip() for message in messages for line in message.splitlines()]
    kept = [line for line in lines if line and not any(noise in line for noise in DRIVER_NOISE)]
    unique = list(dict.fromkeys(kept))[-limit:]
    return "\n".join(f"  {line}" for line in unique) or "  (TensorRT gave no reason)"


def one_line(messages: Iterable[str]) -> str:
    """The last different message, for refusals."""
    return last_words(messages, limit=1).strip(" ()")


def parse_onnx(trt: Any, builder: Any, log: TrtLog, path: Path) -> tuple[Any, Any, list[str]]:
    """The strongly typed network of an ONNX file, its parser and what the parser objects to.

    The parser owns the weights: keep it as long as the network. An objection names the node and
    gives the parser's own words in the lines below it; with one, the network is of no use.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    with log.collect() as messages:
        parsed = parser.parse_from_file(str(path))
    errors = [_objection(parser.get_error(i)) for i in range(parser.num_errors)]
    return network, parser, [] if parsed else errors or [last_words(messages)]


def _objection(error: Any) -> str:
    node = error.node_name() or f"number {error.node()}"
    where = f"node {node} ({error.node_operator()})" if error.node() >= 0 else "graph"
    return f"{where}: {error.code().name}\n{last_words([error.desc()])}"


def supported_capabilities(trt: ModuleType) -> dict[str, Any]:
    """Capabilities that an engine can be built for, by number ("8.9"); empty for `tensorrt`."""
    if not hasattr(trt, "ComputeCapability"):
        return {}
    members = trt.ComputeCapability.__members__
    named = {name[2:]: value for name, value in members.items() if name.startswith("SM")}
    return {f"{digits[:-1]}.{digits[-1]}": value for digits, value in named.items()}


def _logger_class(trt: Any) -> type:
    """A subclass of this module's ILogger that hands every message to a function."""

    class Logger(trt.ILogger):
        def __init__(self, receive: Any) -> None:
            trt.ILogger.__init__(self)
            self._receive = receive

        def log(self, severity: Any, message: str) -> None:
            self._receive(severity, message)

    return Logger
