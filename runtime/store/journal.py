"""Files of one JSON object per line that survive a kill at any moment."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cspd.engines.atomic import atomic_file

Line = dict[str, Any]


def encode(lines: Iterable[Line]) -> bytes:
    """The bytes of `lines`, one JSON object per line."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def rewrite(path: Path, lines: Iterable[Line]) -> None:
    """Put a file of `lines` in the place of `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(encode(lines))


def append(path: Path, lines: Iterable[Line]) -> None:
    """Add `lines` and wait until they are on disk; after an error the file is as it was."""
    rest = memoryview(encode(lines))
    # Unbuffered: a buffer would write what is left in it when the file is closed after an error.
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def read(path: Path) -> list[Line]:
    """The whole lines of `path`, which stays as it is."""
    return [line for line in _lines(path) if line is not None]


def repair(path: Path) -> list[Line]:
    """The whole lines of `path`; anything else (a torn line, bytes never written) is cut out."""
    found = _lines(path)
    lines = [line for line in found if line is not None]
    if len(lines) < len(found):
        rewrite(path, lines)
    return lines


def _lines(path: Path) -> list[Line | None]:
    """The objects in the lines of `path`; None for a line that is not whole."""
    if not path.exists():
        return []
    return [_parse(raw) for raw in path.read_bytes().splitlines(keepends=True)]


def _parse(raw: bytes) -> Line | None:
    """The object in one line; None if the line is not whole."""
    if not raw.endswith(b"\n"):
        return None
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None
