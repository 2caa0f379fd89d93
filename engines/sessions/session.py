"""One way to call a network, whatever runs it: `session(**tensors) -> dict of tensors`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.engines.sessions.interface import CallCheck
from cspd.engines.spec import GraphSpec
from cspd.engines.words import setting


class Session(Protocol):
    """A network ready to run.

    Takes exactly the inputs of `spec` on `device` and returns its outputs there. Inputs are never
    changed. Outputs stay valid until the next call of the same session; keep a clone otherwise.
    """

    @property
    def spec(self) -> GraphSpec:
        """Contract of the network."""
        ...

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        ...

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run the network once."""
        ...


@runtime_checkable
class ForkableSession(Session, Protocol):
    """A session on a GPU whose calls a CUDA graph can hold."""

    def fork(self) -> Session:
        """A session of the same engine with a state and outputs of its own."""
        ...

    def capture_refusal(self) -> str | None:
        """Why its calls cannot be captured; None if it is worth trying."""
        ...


@runtime_checkable
class EngineSession(Protocol):
    """A session with more to tell than results."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as good as it could be."""
        ...

    def save_cache(self) -> None:
        """Store what was compiled, so that the next start is fast."""
        ...


def torch_device(name: str) -> torch.device:
    """The device `name`, "cpu" or "cuda"; CspdError if PyTorch cannot use it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CspdError(f"{setting('device')} is {name!r:.60}, expected cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CspdError(
            f"{setting('device', name)}: PyTorch {torch.__version__} sees no CUDA GPU; "
            f"run cspd-run doctor, or use {setting('device', 'cpu')}"
        )
    return device


class TorchSession:
    """The reference: a PyTorch module called with the tensors of its spec."""

    def __init__(
        self, spec: GraphSpec, module: torch.nn.Module, device: torch.device,
        notes: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.spec, self.device, self.notes = spec, device, notes
        self._module, self._check = module.to(device).eval(), CallCheck(spec)

    def save_cache(self) -> None:
        """Nothing: PyTorch keeps what it compiled by itself."""

    def fork(self) -> TorchSession:
        """This session: a call leaves no state, and its outputs are new every time."""
        return self

    def capture_refusal(self) -> str | None:
        """Why its calls cannot be captured in a CUDA graph; None if it is worth trying."""
        return None if self.spec.capturable else f"{self.spec.name} holds a loop"

    @torch.inference_mode()
    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run the module; its outputs are matched to the spec by position."""
        expected = self._check.inputs(tensors)
        try:
            outputs = self._module(*(tensors[tensor.name] for tensor in self.spec.inputs))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            named = dict(zip(expected, outputs, strict=True))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise CspdError(f"{self.spec.name}: PyTorch cannot run it: {error}") from error
        return self._check.outputs(named, expected)


@dataclass
class CallStats:
    """Calls of one session and the wall-clock time spent in them."""

    calls: int = 0
    seconds: float = 0.0


@dataclass
class TimedSession:
    """A session that counts its calls and their time.

    On CUDA the time is that of issuing the work, not of the work itself: measuring it would need a
    synchronisation in every call.
    """

    session: Session
    stats: CallStats = field(default_factory=CallStats)
    clock: Callable[[], float] = time.perf_counter

    @property
    def spec(self) -> GraphSpec:
        """Contract of the wrapped session."""
        return self.session.spec

    @property
    def device(self) -> torch.device:
        """Device of the wrapped session."""
        return self.session.device

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run the wrapped session."""
        start = self.clock()
        outputs = self.session(**tensors)
        self.stats.calls += 1
        self.stats.seconds += self.clock() - start
        return outputs
