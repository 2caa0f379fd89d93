"""The one place that opens graphs: sessions of a bundle on a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cspd.engines.backends import open_session
from cspd.engines.bundle import Bundle
from cspd.engines.sessions.session import CallStats, EngineSession, Session, TimedSession

# Opens a graph: (bundle, label, backend, device=, threads=), as `engines.backends.open_session`.
Opener = Callable[..., Session]


@dataclass
class Sessions:
    """The graphs of `bundle` on `backend`, opened when they are first asked for, and kept.

    `threads` 0 leaves their number to the backend. `opener` opens a graph; probes and tests give
    their own. `notes` is what a run should know: engines that could be better, for example.
    """

    bundle: Bundle
    backend: str = "onnxruntime"
    device: str = "cpu"
    threads: int = 0
    opener: Opener = open_session
    notes: list[str] = field(default_factory=list)
    opened: dict[str, TimedSession] = field(default_factory=dict)

    def __call__(self, label: str) -> TimedSession:
        """The session of graph `label`."""
        if label not in self.opened:
            session = self.opener(
                self.bundle, label, self.backend, device=self.device, threads=self.threads
            )
            self.opened[label] = TimedSession(session)
            if isinstance(session, EngineSession):
                self.notes += session.notes
        return self.opened[label]

    @property
    def calls(self) -> dict[str, CallStats]:
        """Calls and time of every graph since these sessions were made."""
        return {label: session.stats for label, session in self.opened.items()}

    def save_caches(self) -> None:
        """Keep what engines compiled so far."""
        for timed in self.opened.values():
            if isinstance(timed.session, EngineSession):
                try:
                    timed.session.save_cache()
                except OSError as error:
                    self.notes.append(f"compiled kernels are not kept: {error}")
