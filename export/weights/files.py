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
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cspd.engines.errors import CspdError
from cspd.export.weights.pickle_scan import scan_old, scan_zip

MAX_JSON_HEADER = 100 << 20  # the limit of the safetensors format
MAX_NAMES = 20_000  # of tensors in one file; a training checkpoint of mar-h has 3,000
NAMES_SHOWN = 3
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# Files that people take for weights, by their first bytes.
OTHERS = (
    (b"\x1f\x8b", "a gzip archive; unpack it and name the weights inside"),
    (b"\x93NUMPY", "a single NumPy array; weights are tensors by name, save them as safetensors"),
    (b"GGUF", "a GGUF file; get the weights as the authors publish them, or as safetensors"),
    (b"\x89HDF", "an HDF5 file; get the weights as the authors publish them, or as safetensors"),
)


@dataclass(frozen=True)
class WeightFile:
    """What `path` holds, as loaded; `shards` are the files that an index `path` is made of."""

    path: Path
    content: Any
    form: Literal["safetensors", "pickle"]
    shards: tuple[Path, ...] = ()

    def size(self) -> int:
        """Bytes of the files that the tensors come from."""
        return sum(path.stat().st_size for path in self.shards or (self.path,))

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file; of what `sha256sum` prints for its shards."""
        if not self.shards:
            return file_sha256(self.path)
        lines = [f"{file_sha256(shard)}  {shard.name}\n" for shard in self.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_weights(path: Path) -> WeightFile:
    """Content of the weight file `path`.

    Raises CspdError for anything else: missing, no regular file, cut off, a web page, a Git LFS
    pointer, another archive, a pickle that asks for code or for more work than any checkpoint.
    """
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CspdError(f"{path}: cannot be read ({error.strerror})") from error
    kind = _kind(start, size, path)
    try:
        if kind == "safetensors":
            return WeightFile(path, _load_safetensors(path), "safetensors")
        return WeightFile(path, _unpickle(path, kind), "pickle")
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


def regular_size(path: Path) -> int:
    """Bytes of the regular file `path`, found without opening it: opening a pipe blocks."""
    try:
        status = path.stat()
    except OSError as error:
        raise CspdError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in KINDS if test(status.st_mode)), "something else")
        raise CspdError(f"{path}: {kind}, expected a regular file; store the weights in one first")
    return status.st_size


def check_count(count: int, path: Path) -> None:
    """Raise CspdError for more tensors than any checkpoint of such networks has."""
    if count > MAX_NAMES:
        raise CspdError(
            f"{path}: holds {count:,} tensors, expected at most {MAX_NAMES:,}; get the file from "
            "its authors"
        )


def few(names: Iterable[object]) -> str:
    """The first of `names` and how many more there are."""
    found = [str(name) for name in names]
    more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
    return ", ".join(found[:NAMES_SHOWN]) + more


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _kind(start: bytes, size: int, path: Path) -> Literal["zip", "pickle", "safetensors"]:
    """The format that the first bytes tell."""
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
    for magic, what in OTHERS:
        if start.startswith(magic):
            raise CspdError(f"{path}: {what}")
    raise CspdError(f"{path}: neither a PyTorch checkpoint nor safetensors ({size:,} bytes)")


def _load_safetensors(path: Path) -> Any:
    with safe_open(path, "pt") as file:
        check_count(len(file.keys()), path)
    return load_file(path)


def _unpickle(path: Path, kind: str) -> Any:
    if kind == "zip":
        _check_archive(path)
    scan_zip(path) if kind == "zip" else scan_old(path)
    # The old format before PyTorch 1.6 cannot be memory-mapped.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")


def _check_archive(path: Path) -> None:
    """Raise CspdError unless the zip archive `path` is one that torch.save writes."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    check_count(len(names), path)
    ends = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in ends:
        raise CspdError(
            f"{path}: a TorchScript archive, which is code; save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    if "data.pkl" in ends:
        return
    if names and all(name.endswith(".npy") for name in names):
        raise CspdError(
            f"{path}: a NumPy archive of {len(names)} arrays ({few(names)}), not a checkpoint; "
            "save them as tensors by name: torch.save({n: torch.from_numpy(a) for n, a in "
            "numpy.load(FILE).items()}, NEW)"
        )
    raise CspdError(
        f"{path}: a zip archive of {len(names)} files ({few(names)}), not a checkpoint; unpack it "
        "and name the weights inside"
    )
