"""Progress: a live bar in a terminal or notebook, plain lines on stderr otherwise, or nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cspd.runtime.decode.canvas import Canvas
from cspd.runtime.decode.stats import Statistics

PLAIN_SECONDS = 10.0


class RunProgress:
    """Shows images done, tokens of the batch in work, acceptance, and the time left."""

    def __init__(self, title: str, num_images: int, quiet: bool = False, *, done: int = 0) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._title, self._total, self._done = title, num_images, done
        self._in_work, self._last = 0, time.monotonic()
        self._bar: Progress | None = None
        if not quiet and (self._console.is_terminal or _live_in_notebook(self._console)):
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=num_images, completed=done, note="")

    def __enter__(self) -> RunProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def begin_batch(self, size: int) -> None:
        """Say how many images the batch in work will finish."""
        self._in_work = size

    def on_step(self, canvas: Canvas, statistics: Statistics) -> None:
        """Called after every autoregressive step."""
        share = sum(canvas.known) / canvas.sequence.numel()
        note = f"tokens {share:4.0%}"
        rate = statistics.verdicts.acceptance_rate
        if rate is not None:
            note += f"  accepted {rate:4.0%}"
        self._show(self._done + share * self._in_work, note)

    def say(self, what: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(what, markup=False, highlight=False, soft_wrap=True)

    def advance(self, images: int) -> None:
        """Count finished images."""
        self._done += images
        self._in_work = 0
        self._show(self._done, "", force=self._done == self._total)

    def _show(self, done: float, note: str, force: bool = False) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif force or time.monotonic() - self._last > PLAIN_SECONDS:
            self._last = time.monotonic()
            self._console.print(f"{self._title}: {int(done)}/{self._total} images  {note}".rstrip())


@contextlib.contextmanager
def working(what: str, quiet: bool = False) -> Iterator[None]:
    """Say on stderr that `what` is being done: a spinner on a terminal, a line elsewhere."""
    console = Console(stderr=True, quiet=quiet)
    if not console.is_terminal:
        console.print(what)
        yield
        return
    with console.status(what):
        yield


def _live_in_notebook(console: Console) -> bool:
    """Whether rich can redraw a bar in this notebook: without ipywidgets it only warns."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
