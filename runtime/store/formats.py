"""Formats of a finished run: loose PNGs, or shards packed from them one image at a time."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from pydantic import Field

from cspd.engines.atomic import atomic_file
from cspd.engines.errors import MissingExtraError
from cspd.engines.spec import Record
from cspd.runtime.decode.stats import Verdicts
from cspd.runtime.store.images import decode_png, numbered

Format = Literal["png", "webdataset", "npz", "parquet"]
SUFFIX = {"webdataset": "tar", "npz": "npz", "parquet": "parquet"}
SHARDED = ("webdataset", "parquet")  # formats of several files
# Rows that parquet holds in memory at once; the unit that readers load.
ROW_GROUP = 64
# Verdicts of an image, each a column of a parquet shard.
COUNTS = tuple(field.name for field in fields(Verdicts))


class Layout(Record):
    """How a run lies on disk: its format, and the images per shard (npz is always one file)."""

    format: Format = "png"
    shard_size: int = Field(1000, ge=1)

    def shards(self, num_images: int) -> list[Shard]:
        """Every shard of a run of `num_images`; none for loose PNGs."""
        if self.format == "png":
            return []
        if self.format == "npz":
            return [Shard("samples.npz", 0, num_images)]
        size, suffix = self.shard_size, SUFFIX[self.format]
        firsts = range(0, num_images, size)
        return [
            Shard(numbered(number, len(firsts), suffix), first, min(first + size, num_images))
            for number, first in enumerate(firsts)
        ]

    def check(self) -> None:
        """Raise MissingExtraError if a library that the format needs is not installed."""
        if self.format == "parquet":
            _pyarrow()


@dataclass(frozen=True)
class Shard:
    """The file `name` of the images `first` .. `end` - 1."""

    name: str
    first: int
    end: int

    @property
    def indices(self) -> range:
        """Its images."""
        return range(self.first, self.end)


@dataclass(frozen=True)
class Member:
    """One image of a shard: its line of `images.jsonl` and its PNG."""

    line: dict[str, Any]
    png: bytes


def pack(path: Path, members: Iterator[Member], count: int, about: dict[str, Any]) -> str:
    """Write a shard of `count` images, whole or not at all; returns the SHA-256 of the file.

    `members` is read one at a time; `about` describes the run, where the format has a place for
    it. The bytes depend on the arguments only.
    """
    packers = {".tar": _write_tar, ".parquet": _write_parquet, ".npz": _write_npz}
    with atomic_file(path) as file:
        packers[path.suffix](file, members, count, about)
    with path.open("rb") as written:
        return hashlib.file_digest(written, "sha256").hexdigest()


def _write_tar(file: IO[bytes], members: Iterable[Member], count: int, about: Any) -> None:
    """WebDataset: `KEY.png`, `KEY.cls` (class number) and `KEY.json` for each image."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member in members:
            key = Path(member.line["file"]).stem
            parts = {
                "png": member.png,
                "cls": str(member.line["label"]).encode(),
                "json": json.dumps(member.line).encode(),
            }
            for suffix, content in parts.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size, entry.mode = len(content), 0o644
                tar.addfile(entry, io.BytesIO(content))


def _write_npz(file: IO[bytes], members: Iterable[Member], count: int, about: Any) -> None:
    """ADM's samples: `arr_0` [N, H, W, C] uint8 and `arr_1` [N] int64, the classes."""
    labels = np.zeros(count, dtype=np.int64)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array:
            for row, member in enumerate(members):
                pixels = decode_png(member.png)
                if row == 0:
                    header = {
                        "descr": "|u1",
                        "fortran_order": False,
                        "shape": (count, *pixels.shape),
                    }
                    np.lib.format.write_array_header_1_0(array, header)
                array.write(pixels.tobytes())
                labels[row] = member.line["label"]
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as array:
            np.lib.format.write_array(array, labels)


def _write_parquet(
    file: IO[bytes], members: Iterable[Member], count: int, about: dict[str, Any]
) -> None:
    """A table whose `image` column (bytes, path) and metadata are those of Hugging Face."""
    arrow = _pyarrow()
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    columns = [("image", image), ("index", arrow.int64()), ("label", arrow.int64())]
    columns += [("class", arrow.string()), ("sha256", arrow.string())]
    schema = arrow.schema([*columns, *((name, arrow.int64()) for name in COUNTS)])
    features = {"info": {"features": _features(schema.names)}}
    schema = schema.with_metadata({"huggingface": json.dumps(features), "cspd": json.dumps(about)})
    with importlib.import_module("pyarrow.parquet").ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []
        for member in members:
            rows.append(_row(member))
            if len(rows) == ROW_GROUP:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_table(arrow.Table.from_pylist(rows, schema))


def _row(member: Member) -> dict[str, Any]:
    line = member.line
    return {
        "image": {"bytes": member.png, "path": line["file"]},
        "index": line["image"],
        **{name: line[name] for name in ("label", "class", "sha256", *COUNTS)},
    }


def _features(names: list[str]) -> dict[str, Any]:
    """The columns in the words of Hugging Face's datasets, so that images are shown as such."""
    kinds = {"image": {"_type": "Image"}} | {
        name: {"dtype": "string", "_type": "Value"} for name in ("class", "sha256")
    }
    return {name: kinds.get(name, {"dtype": "int64", "_type": "Value"}) for name in names}


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet") from None
