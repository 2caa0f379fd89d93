"""Reading weight files that nobody vouches for: told by their bytes, never by their name.

Nothing in a file is executed: pickles go through PyTorch's restricted loader, which builds tensors,
plain containers and `argparse.Namespace` (the authors store their options as one). Tensors stay
memory-mapped, so that a 7 GB checkpoint with optimizer state costs no more than what is used of it.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cspd.engines.errors import CspdError
from cspd.export.pickle_scan import scan_old, scan_zip

MAX_JSON_HEADER = 100 << 20  # the limit of the safetensors format


def read_weights(path: Path) -> tuple[Any, bool]:
    """Content of a weight file, and whether it is safetensors.

    Raises CspdError for anything else: missing, cut off, a web page, a Git LFS pointer, a pickle
    that asks for code.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CspdError(f"{path}: cannot be read ({error.strerror})") from error
    kind = _kind(start, size, path)
    try:
        return (load_file(path), True) if kind == "safetensors" else (_unpickle(path, kind), False)
    except CspdError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {found[1]}" if found else "its pickle is not of tensors alone"
        raise CspdError(
            f"{path}: refused, because loading it could run code ({what}); only tensors and "
            "argparse.Namespace are accepted. Get the file from its authors, or as safetensors"
        ) from error
    except Exception as error:  # on damaged input the parsers raise anything at all
        detail = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise CspdError(
            f"{path}: damaged or cut off at {size:,} bytes ({detail}); download it again and "
            "compare the size"
        ) from error


def _kind(start: bytes, size: int, path: Path) -> str:
    """One of "zip", "pickle", "safetensors", from the first bytes."""
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise CspdError(f"{path}: a Git LFS pointer, not the weights; run: git lfs pull")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CspdError(
            f"{path}: a web page saved under the name of a checkpoint ({size:,} bytes); the link "
            "asked for a confirmation or has expired, download it again"
        )
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < MAX_JSON_HEADER:
        return "safetensors"
    if start.startswith(b"\x80"):
        return "pickle"
    raise CspdError(f"{path}: neither a PyTorch checkpoint nor safetensors ({size:,} bytes)")


def _unpickle(path: Path, kind: str) -> Any:
    scan_zip(path) if kind == "zip" else scan_old(path)
    # The old format before PyTorch 1.6 cannot be memory-mapped.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
