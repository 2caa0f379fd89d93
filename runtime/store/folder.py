"""The folder of a run. Whatever ends a run, the same command resumes where it was.

`settings.json` says which run it is, from the first moment on. An image is first its file (renamed
into place), then its line in `images.jsonl`; a shard is first its file, then its line in
`shards.jsonl`. A line is a promise that is checked by hash when a run is resumed: what follows from
the settings is never read from it, and the rest counts only with its checksum. `unfinished.jsonl`
holds what each batch counted, until `run.json` is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from cspd.engines.atomic import atomic_file
from cspd.engines.bundle import Bundle, hash_file
from cspd.engines.errors import CspdError
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.stats import TALLY, Tally, Verdicts
from cspd.runtime.store import images, journal
from cspd.runtime.store.batches import FinishedBatch, ImageFile
from cspd.runtime.store.formats import Layout, Member, Shard, pack
from cspd.runtime.store.outputs import RUN_SCHEMA, tool_version
from cspd.runtime.store.ownership import (
    GRID,
    IMAGES,
    JOURNAL,
    PENDING,
    PREVIEW,
    RUN,
    SETTINGS,
    SHARDS,
)
from cspd.runtime.store.seal import CHECK, key_of, seal

GRID_LIMIT = 64


@dataclass
class RunFolder:
    """A run on disk; made by `resume.open_run`, a context that keeps other processes out."""

    folder: Path
    config: RunConfig
    bundle: Bundle
    layout: Layout
    lines: dict[int, journal.Line] = field(default_factory=dict)
    packed: dict[str, journal.Line] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    # Why the heads of the run sample as they do, by role.
    choices: dict[str, str] = field(default_factory=dict)
    # run.json of a run that was finished before.
    record: dict[str, Any] | None = None
    # Keeps other processes out; closed with the context.
    lock: int | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one in the folder to resume it."""
        return {
            "schema": RUN_SCHEMA,
            "tool": tool_version(),
            "bundle": self.bundle.sha256,
            "config": self.config.model_dump(mode="json"),
            "layout": self.layout.model_dump(mode="json"),
        }

    @cached_property
    def _key(self) -> bytes:
        return key_of(self.identity)

    def sealed(self, line: journal.Line) -> journal.Line:
        """`line` with its checksum, which is good for this run only."""
        return seal(self._key, line)

    def image_line(self, index: int, sha256: str, verdicts: Verdicts) -> journal.Line:
        """The line of an image: all but hash and verdicts follows from the settings."""
        label = self.config.label_of(index)
        return self.sealed(
            {
                "image": index,
                "file": self.image_path(index).name,
                "label": label,
                "class": self.bundle.manifest.class_names[label],
                "sha256": sha256,
                **asdict(verdicts),
            }
        )

    def shard_line(self, shard: Shard, sha256: str) -> journal.Line:
        """The line of a shard: all but the hash follows from the settings."""
        return self.sealed(
            {
                "file": shard.name,
                "first": shard.first,
                "images": len(shard.indices),
                "sha256": sha256,
            }
        )

    def read_image_line(self, found: journal.Line) -> journal.Line | None:
        """The line as it was written, from one that was read; None if its checksum is wrong."""
        index, sha256 = found.get("image"), found.get("sha256")
        verdicts = Verdicts(*(found.get(item.name) for item in fields(Verdicts)))  # type: ignore[arg-type]
        if type(index) is not int or not 0 <= index < self.config.num_images:
            return None
        if not isinstance(sha256, str) or not verdicts.adds_up:
            return None
        line = self.image_line(index, sha256, verdicts)
        return line if line[CHECK] == found.get(CHECK) else None

    def read_shard_line(self, shard: Shard, found: journal.Line) -> journal.Line | None:
        """The line as it was written, from one that was read; None if its checksum is wrong."""
        sha256 = found.get("sha256")
        if not isinstance(sha256, str):
            return None
        line = self.shard_line(shard, sha256)
        return line if line[CHECK] == found.get(CHECK) else None

    @property
    def missing(self) -> list[int]:
        """Images to be made, in order.

        Without `reproducible` an image depends on its batch, so a batch is made whole or not at
        all: then too it is the same to the byte as in a run that nothing disturbed.
        """
        absent = [index for index in range(self.config.num_images) if index not in self.lines]
        if self.config.reproducible:
            return absent
        size = self.config.batch_size
        batches = {index // size for index in absent}
        return [index for index in range(self.config.num_images) if index // size in batches]

    @property
    def state(self) -> str:
        """What is safe on disk, in words."""
        safe = f"{len(self.lines)} of {self.config.num_images} images are safe on disk"
        return f"{self.folder}: {safe}" + (f" ({spans(self.lines)})" if self.lines else "")

    @property
    def again(self) -> str:
        """What resumes the run, in words: by default every command has a folder of its own."""
        return f"the same command with --out {self.folder} resumes"

    @property
    def finished_shards(self) -> list[Shard]:
        """Shards that are on disk and intact."""
        shards = self.layout.shards(self.config.num_images)
        return [shard for shard in shards if shard.name in self.packed]

    def add(self, batch: FinishedBatch) -> None:
        """Write the images of a batch, then their lines, then its counts; pack full shards."""
        with self.writing("images"):
            lines = [self._write(file) for file in batch.files]
            journal.append(self.folder / IMAGES, lines)
            self.lines.update({line["image"]: line for line in lines})
            counts = json.loads(TALLY.dump_json(batch.tally))
            journal.append(self.folder / JOURNAL, [self.sealed(counts)])
            self.tally.add(batch.tally)
        self.pack_full()

    def pack_full(self) -> None:
        """Pack every shard whose images are all there."""
        for shard in self.layout.shards(self.config.num_images):
            # From the end, because images come roughly in order.
            there = all(index in self.lines for index in reversed(shard.indices))
            if there and shard.name not in self.packed:
                with self.writing(shard.name):
                    self._pack(shard)

    def begin(self) -> None:
        """Write which run this is, and the choices that were made for it."""
        self._write_json(SETTINGS, self.identity | {"choices": self.choices})

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write the grid, and `record` with the hashes of all lines as `run.json`; returns it."""
        with self.writing(f"{GRID} and {RUN}"):
            if not (self.folder / GRID).exists():
                self._write_grid()
            self.rewrite_lines()
            record = self.sealed(record | {"files": self.line_hashes()})
            self._write_json(RUN, record)
            for path in (self.folder / PENDING).glob("*"):
                path.unlink()
            if (self.folder / PENDING).exists():
                (self.folder / PENDING).rmdir()
            (self.folder / JOURNAL).unlink(missing_ok=True)
        return record

    def rewrite_lines(self) -> None:
        """Write the lines of all images and shards in order, as a finished run has them."""
        journal.rewrite(self.folder / IMAGES, (self.lines[i] for i in sorted(self.lines)))
        if self.packed:
            lines = [self.packed[shard.name] for shard in self.finished_shards]
            journal.rewrite(self.folder / SHARDS, lines)

    def line_hashes(self) -> dict[str, str]:
        """SHA-256 of the files of lines, by name."""
        paths = [self.folder / name for name in (IMAGES, SHARDS)]
        return {path.name: hash_file(path).sha256 for path in paths if path.exists()}

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn an error of the file system into one that says what is safe."""
        try:
            yield
        except OSError as error:
            raise CspdError(
                f"{self.state}, {what} cannot be written: {error.strerror}; "
                f"when that is fixed, {self.again}"
            ) from error

    def image_path(self, index: int) -> Path:
        """Where the PNG of an image is, or waits for its shard."""
        folder = self.folder if self.layout.format == "png" else self.folder / PENDING
        return folder / images.numbered(index, self.config.num_images, "png")

    def _write(self, file: ImageFile) -> journal.Line:
        """Write one image; returns its line."""
        path = self.image_path(file.index)
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as stream:
            stream.write(file.png)
        return self.image_line(file.index, hashlib.sha256(file.png).hexdigest(), file.verdicts)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with atomic_file(self.folder / name) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")

    def _pack(self, shard: Shard) -> None:
        """Write a shard, then its line; its PNGs go, but for those that the grid needs."""
        members = (
            Member(self.lines[index], self.image_path(index).read_bytes())
            for index in shard.indices
        )
        digest = pack(self.folder / shard.name, members, len(shard.indices), self.identity)
        line = self.shard_line(shard, digest)
        journal.append(self.folder / SHARDS, [line])
        self.packed[shard.name] = line
        for index in shard.indices[max(0, GRID_LIMIT - shard.first) :]:
            self.image_path(index).unlink()

    def _write_grid(self) -> None:
        shown = range(min(GRID_LIMIT, self.config.num_images))
        pixels = [images.decode_png(self.image_path(index).read_bytes()) for index in shown]
        sheet = images.grid(pixels, [self.lines[index]["class"] for index in shown])
        (self.folder / PREVIEW).mkdir(exist_ok=True)
        with atomic_file(self.folder / GRID) as file:
            sheet.save(file, format="PNG")


def spans(indices: Any, limit: int = 4) -> str:
    """Such as "0..7, 12" for 0 to 7 and 12; only the first `limit` pieces."""
    pieces: list[list[int]] = []
    for index in sorted(indices):
        if pieces and pieces[-1][1] == index - 1:
            pieces[-1][1] = index
        else:
            pieces.append([index, index])
    shown = [str(a) if a == b else f"{a}..{b}" for a, b in pieces[:limit]]
    return ", ".join(shown + ["..."] * (len(pieces) > limit))
