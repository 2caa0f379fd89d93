"""Standard streams that a full disk, or a shell that closed them, cannot turn into a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO


class _Descriptor(io.FileIO):
    """A descriptor that remembers the first error of a write, and takes the rest for written.

    So the work is finished whatever becomes of its report. Only a reader of stdout that left is no
    such error: what writes to it should stop.
    """

    def __init__(self, number: int, *, closed: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self.error = OSError(errno.EBADF, os.strerror(errno.EBADF)) if closed else None
        self.lost = False

    def write(self, data: Any) -> int:
        """Write `data`, or lose it."""
        if self.error is None:
            try:
                return super().write(data) or 0
            except OSError as error:
                if error.errno == errno.EPIPE and self.fileno() == 1:
                    raise
                self.error = error
        self.lost = True
        return memoryview(data).nbytes


def guard() -> None:
    """Put streams of `_Descriptor` in the place of Python's own; others (of tests) stay.

    A descriptor that is closed is opened to nowhere first: the next file that anything opens would
    get its number, and messages of libraries would be written into that file.
    """
    closed = {number for number in (0, 1, 2) if not _is_open(number)}
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(1, sys.__stdout__, closed=sys.__stdout__ is None)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, sys.__stderr__, closed=sys.__stderr__ is None)


def failure() -> str | None:
    """Why something that was written to stdout got lost; None if all of it arrived."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", None)
    if not isinstance(raw, _Descriptor):
        return None
    sys.stdout.flush()
    return raw.error.strerror if raw.lost and raw.error else None


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _stream(number: int, old: TextIO | None, *, closed: bool) -> TextIO:
    buffer = io.BufferedWriter(_Descriptor(number, closed=closed))
    encoding, errors = ("utf-8", "replace") if old is None else (old.encoding, old.errors)
    interactive = number == 2 or buffer.isatty()
    # Half a character of a file's name must not end a command, nor bytes that are no text leave it.
    if errors in ("strict", "surrogateescape"):
        errors = "backslashreplace"
    return io.TextIOWrapper(buffer, encoding, errors, line_buffering=interactive)
