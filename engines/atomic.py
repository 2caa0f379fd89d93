"""Files that appear complete or not at all, and files that lie in two places."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cspd.engines.errors import CspdError


@contextlib.contextmanager
def atomic_file(out: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `out` when the block ends well, and vanishes otherwise."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def link_file(source: Path, target: Path) -> None:
    """Let `target` be `source`: a hard link, or a copy where the file systems have none."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def check_writable(out: Path) -> None:
    """Make the folder of `out`; raises CspdError, before any work, if no file can be put there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CspdError(f"{out.parent}: no folder can be made: {error.strerror}") from None
    if out.is_dir():
        raise CspdError(f"{out}: is a folder, expected the name of a file to write")
    if not os.access(out.parent, os.W_OK):
        raise CspdError(f"{out.parent}: cannot be written to; choose another place")


def check_folder(out: Path) -> None:
    """Raise CspdError if something that is no folder stands at `out` or above it."""
    there = out if os.path.lexists(out) else standing_parent(out)
    if not there.is_dir():
        raise CspdError(f"{there}: is not a folder; choose another --out")


def standing_parent(out: Path) -> Path:
    """The nearest thing above `out` that is there already; a folder, if `out` can be made."""
    return next(parent for parent in out.absolute().parents if os.path.exists(parent))


def free_disk(out: Path) -> int:
    """Bytes that can be written where `out` is to be made."""
    return shutil.disk_usage(standing_parent(out)).free
