"""SIGINT and SIGTERM as a wish to stop after the images in flight."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from rich.console import Console

from cspd.engines.errors import CspdError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(CspdError):
    """A run that was asked to stop and can be resumed; it exits with 128 + the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopWish:
    """Notes the first signal; the second one stops at once with KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, it notes nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopWish:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        Console(stderr=True).print("finishing the images in flight; once more stops at once")

    def check(self, state: str, again: str = "the same command resumes") -> None:
        """Raise Interrupted if a signal came; `state` says what is safe, `again` what resumes."""
        if self.number is not None:
            name = signal.Signals(self.number).name
            raise Interrupted(f"{state}, stopped by {name}; {again}", self.number)
