"""Memory: the peak of this process, giving back what is free, and what the machine has left."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int | None]]:
    """A function giving the highest resident size of this process since the block began, in bytes.

    Mapped files count. Where the kernel cannot reset its mark, it is the highest since the process
    began; None where the system does not tell.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield _high_water_mark


def release_memory() -> None:
    """Give freed memory back to the system: the C library keeps gigabytes between large graphs."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def available_memory() -> int | None:
    """Bytes that new work can have without swapping; None where the system does not tell."""
    return _field("/proc/meminfo", "MemAvailable")


def _high_water_mark() -> int | None:
    return _field("/proc/self/status", "VmHWM")


def _field(path: str, name: str) -> int | None:
    """The bytes that a line "NAME: N kB" of the file `path` speaks of."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.M)
        return int(found[1]) * 1024 if found else None
    return None
