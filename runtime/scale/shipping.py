"""A bundle on its way to the nodes of a Ray cluster: once per node, checked by hash there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cspd.engines.bundle import MANIFEST, Bundle, open_bundle
from cspd.engines.errors import BundleError, CspdError

PIECE = 64 << 20  # bytes per object, so that no node needs a whole file in memory


@dataclass(frozen=True)
class Shipment:
    """A bundle in Ray's object store: references to the pieces of every file, by file name."""

    sha256: str
    files: dict[str, list[Any]]


def ship(ray: Any, bundle: Bundle) -> Shipment:
    """Put `bundle` into the object store; the references keep it there."""
    paths = {MANIFEST: bundle.folder / MANIFEST}
    paths |= {name: bundle.file(name) for name in bundle.manifest.files}
    return Shipment(
        bundle.sha256,
        {name: [ray.put(piece) for piece in _pieces(path)] for name, path in paths.items()},
    )


def unpack(ray: Any, shipment: Shipment, root: Path | None = None) -> Bundle:
    """The bundle on this node's disk, every hash checked; the first caller on a node writes it."""
    root = root or node_folder()
    folder = root / shipment.sha256
    with _locked(root / f"{shipment.sha256}.lock"):
        try:
            return _checked(folder, shipment.sha256)
        except BundleError:
            shutil.rmtree(folder, ignore_errors=True)
        for name, pieces in shipment.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for piece in pieces:
                    file.write(ray.get(piece))
        return _checked(folder, shipment.sha256)


def node_folder() -> Path:
    """A folder of this user's for bundles in the node's temporary folder; nobody else's."""
    folder = Path(tempfile.gettempdir()) / f"cspd-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise CspdError(f"{folder}: belongs to somebody else; remove it, or set TMPDIR")
    return folder


def _pieces(path: Path) -> Iterator[np.ndarray]:
    """A file as arrays of bytes."""
    for offset in range(0, path.stat().st_size, PIECE):
        yield np.fromfile(path, dtype=np.uint8, count=PIECE, offset=offset)


def _checked(folder: Path, sha256: str) -> Bundle:
    """The bundle in `folder`; BundleError unless it is whole and the one asked for."""
    bundle = open_bundle(folder)
    if bundle.sha256 != sha256:
        raise BundleError(f"{folder}: is bundle {bundle.sha256[:12]}, expected {sha256[:12]}")
    for name in bundle.manifest.files:
        bundle.file(name)
    return bundle


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process of this node at a time; a dead process holds nothing."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
