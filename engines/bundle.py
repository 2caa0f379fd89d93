"""A bundle on disk: read with every hash checked, published in one rename."""

from __future__ import annotations

import glob
import hashlib
import importlib.resources
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from cspd.engines.errors import BundleError, CspdError
from cspd.engines.manifest import FileRecord, GraphRecord, Manifest
from cspd.engines.onnx_external import external_locations
from cspd.engines.weights import check_weights_file
from cspd.engines.words import shell

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20


def hash_file(path: Path) -> FileRecord:
    """SHA-256 and size of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileRecord(sha256=digest.hexdigest(), bytes=path.stat().st_size)


@dataclass(frozen=True)
class Bundle:
    """A folder with a manifest. Files are handed out only after their hash was checked.

    They may be links out of the folder, as in the cache of Hugging Face: the hash vouches for them.
    """

    folder: Path
    manifest: Manifest

    @cached_property
    def sha256(self) -> str:
        """Identity of the bundle: the hash of its manifest, which holds the hash of every file."""
        return hash_file(self.folder / MANIFEST).sha256

    @cached_property
    def shipped(self) -> bool:
        """Whether this is the bundle inside the package."""
        package = Path(str(importlib.resources.files("cspd.demo_pair"))).resolve()
        return self.folder.resolve().is_relative_to(package)

    def engine_command(self, flavour: str) -> str:
        """The command that makes such a bundle with engines of TensorRT `flavour`."""
        if self.shipped:
            return f"cspd-export demo-pair --backend {flavour} --out DIR"
        return f"cspd-export build --backend {flavour}"

    @cached_property
    def _verified(self) -> set[str]:
        return set()

    def file(self, name: str) -> Path:
        """Path of the file `name`; raises BundleError unless it is what the manifest says.

        Weights have to be finite too.
        """
        path = self.folder / name
        if name in self._verified:
            return path
        try:
            self._verify(path, self.manifest.files[name])
            if name in self.manifest.weights():
                check_weights_file(path)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}") from None
        self._verified.add(name)
        return path

    def _verify(self, path: Path, record: FileRecord) -> None:
        rebuild = "copy the bundle again, or rebuild it with cspd-export build"
        if not path.is_file():
            raise BundleError(f"{path}: missing from the bundle; {rebuild}")
        if path.stat().st_size != record.bytes or hash_file(path) != record:
            raise BundleError(f"{path}: differs from the hash in {MANIFEST}; {rebuild}")

    def graph_file(self, label: str) -> Path:
        """Verified ONNX file of the graph `label`, its weights verified too."""
        weights = [self.file(name) for name in self._weights(label)]
        path = self.file(self.graph(label).file)
        beside = [file for file in weights if file.parent == path.parent]
        self._check_external(path, {file.name for file in beside})
        for file in beside:
            self._check_reach(path, file)
        return path

    def _check_reach(self, graph: Path, weights: Path) -> None:
        """Raise BundleError if a link leads from `weights` to where ONNX Runtime refuses to read.

        It reads external data below the folder of a graph, and below the one that the graph itself
        is linked from: the cache of Hugging Face keeps all files in one.
        """
        places = (graph.parent.resolve(), graph.resolve().parent)
        if not any(weights.resolve().is_relative_to(place) for place in places):
            copy = shell("cp", "-rL", self.folder, f"{self.folder.resolve().name}-copy")
            raise BundleError(
                f"{weights}: is a link out of the folder of {graph.name}, which ONNX Runtime does "
                f"not follow; use a copy of the bundle without links: {copy}"
            )

    def _check_external(self, path: Path, weights: set[str]) -> None:
        """Raise BundleError if the ONNX file `path` reads anything beside it but `weights`."""
        try:
            locations = external_locations(path.read_bytes())
        except CspdError as error:
            raise BundleError(f"{path}: {error}; rebuild it with cspd-export build") from None
        for location in locations:
            if location not in weights:
                raise BundleError(
                    f"{path}: wants to read {location!r:.100}, which is not its weights file in "
                    f"{MANIFEST}; rebuild it with cspd-export build"
                )

    def weight_bytes(self, label: str) -> int:
        """Size of the weight files that the graph `label` reads from."""
        return sum(self.manifest.files[name].bytes for name in self._weights(label))

    def _weights(self, label: str) -> list[str]:
        manifest, (role, _, _) = self.manifest, label.partition("/")
        model = manifest.models.get(role)  # type: ignore[call-overload]
        names = [model.weights, model.first_weights] if model else [manifest.decoder_weights]
        return [name for name in names if name]

    def graph(self, label: str) -> GraphRecord:
        """Record of the graph `label`, such as "target/backbone" or "decoder"."""
        graphs = self.manifest.graphs()
        if label not in graphs:
            raise BundleError(
                f"{self.folder}: has no graph {label}, it has {', '.join(sorted(graphs))}; "
                "rebuild it with cspd-export build"
            )
        return graphs[label]


def open_bundle(folder: Path) -> Bundle:
    """Read the manifest of `folder`; files are checked when they are used."""
    path = folder / MANIFEST
    content = _read_manifest(path)
    try:
        return Bundle(folder, Manifest.model_validate_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        wrong = first.get("ctx", {}).get("error") or first["msg"]
        raise BundleError(
            f"{path}: {where}: {wrong}; rebuild the bundle with this version of cspd-export"
        ) from None


def _read_manifest(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise BundleError(
                f"{path.parent}: no {MANIFEST} there, so it is not a bundle; make one with "
                "cspd-export build --target mar-h --draft mar-b --out DIR"
            )
        with path.open("rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read ({error.strerror}); name the folder of a bundle of cspd-export"
        ) from None
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{path}: larger than {MAX_MANIFEST_BYTES >> 20} MiB, not a manifest of cspd-export"
        )
    return content


def publish(staging: Path, folder: Path, overwrite: bool) -> None:
    """Move a finished bundle to `folder` in one rename; an old bundle there is kept until then."""
    check_target(folder, overwrite)
    prefix = f".{folder.name}.old."
    if folder.exists():
        folder.rename(Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent)) / "bundle")
    staging.rename(folder)
    # Of this time, and of times when the process was killed before it came here.
    for old in folder.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(old)


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise CspdError unless a bundle may be written to `folder`."""
    try:
        _check_target(folder, overwrite)
    except OSError as error:
        raise CspdError(f"{folder}: {error.strerror}; choose another --out") from None


def _check_target(folder: Path, overwrite: bool) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if not folder.exists():
        return
    if not (folder / MANIFEST).is_file():
        raise CspdError(f"{folder}: exists and is not a bundle; choose another --out")
    if not overwrite:
        raise CspdError(f"{folder}: holds a bundle already; add --overwrite to replace it")


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Hashes of the files `names` below `folder`."""
    return {name: hash_file(folder / name) for name in sorted(set(names))}
