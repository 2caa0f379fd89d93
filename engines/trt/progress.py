"""Progress of an engine build: TensorRT's nested phases as one fraction, and a bar for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

# Called with the fraction of the build that is done, 0..1, and the name of the current phase.
ProgressCallback = Callable[[float, str], None]


@contextlib.contextmanager
def rich_progress(name: str, progress: Progress | None = None) -> Iterator[ProgressCallback]:
    """A bar named `name` for one build, as a callback; in `progress`, or in its own on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[phase]}"))
    with contextlib.ExitStack() as stack:
        if progress is None:
            bars = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
            progress = stack.enter_context(bars)
        task = progress.add_task(name, total=1.0, phase="")
        yield lambda fraction, phase: progress.update(task, completed=fraction, phase=phase)
        progress.update(task, completed=1.0, phase="")


def make_monitor(trt: ModuleType, progress: ProgressCallback | None) -> Any:
    """A progress monitor for one build of this TensorRT module.

    What `progress` raises, Ctrl-C included, stops the build and is left in `failure`: an exception
    must not cross TensorRT's own frames.
    """
    return _monitor_class(trt)(progress)


def _monitor_class(trt: Any) -> type:
    """A subclass of this module's IProgressMonitor that turns nested phases into one fraction."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self, progress: ProgressCallback | None) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._progress = progress
            self._phases: list[tuple[str, int, int]] = []  # name, steps done, steps in all
            self._fraction = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases.append((name, 0, steps))
            self._report(name)

        def phase_finish(self, name: str) -> None:
            self._phases = [phase for phase in self._phases if phase[0] != name]

        def step_complete(self, name: str, step: int) -> bool:
            self._phases = [
                (phase, step + 1 if phase == name else done, steps)
                for phase, done, steps in self._phases
            ]
            return self._report(name)

        def _report(self, name: str) -> bool:
            """Tell the callback. An exception (Ctrl-C too) must not cross TensorRT's frames."""
            fraction = 0.0
            for _, done, steps in reversed(self._phases):
                fraction = min((done + fraction) / steps, 1.0)
            self._fraction = max(self._fraction, fraction)
            try:
                if self._progress is not None and self.failure is None:
                    self._progress(self._fraction, name)
            except BaseException as error:
                self.failure = error
            return self.failure is None

    return Monitor
