"""Which files of a folder a run owns. Nothing else is replaced or removed, whatever its name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cspd.engines.errors import CspdError
from cspd.runtime.store import journal
from cspd.runtime.store.formats import SUFFIX, Layout
from cspd.runtime.store.images import KEY, numbered
from cspd.runtime.store.outputs import RUN_SCHEMA
from cspd.runtime.store.seal import identity_of

SETTINGS, RUN, IMAGES, SHARDS = "settings.json", "run.json", "images.jsonl", "shards.jsonl"
# Apart from the images, so that whoever reads all PNGs of the folder reads these and nothing else.
PREVIEW = "preview"
GRID = f"{PREVIEW}/grid.png"
# The run at work: its counts, and the images that wait for their shard.
JOURNAL, PENDING = "unfinished.jsonl", "pending"
# How a record begins, also one that was cut.
HEAD = '{\n "schema": '
# Keys of every line, of this version or of one before; a journal began with the settings once.
KEYS = {
    IMAGES: [{"image", "sha256"}],
    SHARDS: [{"first", "sha256"}],
    JOURNAL: [{"images", "seconds"}, {"config"}],
}
# What files of ours hold near their beginning or end.
PNG_MARK = b"iTXt" + KEY.encode() + b"\0"
MARKS = {
    ".png": PNG_MARK, ".tar": PNG_MARK, ".parquet": KEY.encode(), ".npz": b"arr_0.npy",
}  # fmt: skip
NEAR = 1 << 16  # bytes
SHOWN = 3  # names in a message


def is_run(there: dict[str, Any] | None) -> bool:
    """Whether this is what a run says of itself, of any version: not a file of that name alone."""
    if there is None or not isinstance(there.get("tool"), str):
        return False
    bundle, config = there.get("bundle"), there.get("config")
    if not isinstance(bundle, str) or not re.fullmatch("[0-9a-f]{64}", bundle):
        return False
    return isinstance(config, dict) and type(config.get("num_images")) is int


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is none."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def run_files(folder: Path, there: dict[str, Any]) -> list[Path]:
    """The files in `folder` that the run of the identity `there` wrote.

    A name alone does not make a file the run's: its content must be of our making, or a line of
    the run must promise it, or a kill or a bad disk left it empty. In the folder `preview` of a run
    only the names count.
    """
    promised = _promised(folder)
    return [path for path in _named(folder, there) if _is_ours(path, folder, promised)]


def refuse_foreign(folder: Path, owned: list[Path], new: dict[str, Any]) -> None:
    """Raise CspdError if a file that is not `owned` stands where the run `new` has its own."""
    mine = set(owned)
    foreign = [path for path in _named(folder, new) if path not in mine]
    if foreign:
        raise CspdError(
            f"{folder}: {listed(folder, foreign)}: not written by the run in this folder, but "
            "called like a file of a run; move what is yours away, or choose another --out"
        )


def listed(folder: Path, paths: list[Path]) -> str:
    """The first names of `paths`."""
    names = sorted(str(path.relative_to(folder)) for path in paths)
    return ", ".join(names[:SHOWN] + ["..."] * (len(names) > SHOWN))


def _named(folder: Path, there: dict[str, Any]) -> Iterator[Path]:
    """Files that are called like those of the run of `there`."""
    for path in (*folder.iterdir(), *(folder / PREVIEW).glob("*"), *(folder / PENDING).glob("*")):
        if path.is_file() and _is_name(str(path.relative_to(folder)), there):
            yield path


def _is_name(name: str, there: dict[str, Any]) -> bool:
    """Whether the run of `there` has a file `name` at some time."""
    if name in (SETTINGS, RUN, IMAGES, SHARDS, JOURNAL, GRID):
        return True
    # A grid at the top was written before version 2 of the schema.
    if name == "grid.png":
        return there.get("schema") != RUN_SCHEMA
    layout, count = _layout(there), there["config"]["num_images"]
    if layout.format == "npz" and name == "samples.npz":
        return True
    if layout.format == "png":
        return _is_number(name, count, "png")
    if name.startswith(f"{PENDING}/"):
        return _is_number(name.removeprefix(f"{PENDING}/"), count, "png")
    shards = -(-count // layout.shard_size)
    return _is_number(name, shards, SUFFIX[layout.format])


def _is_number(name: str, count: int, suffix: str) -> bool:
    """Whether `name` is that of one of `count` files."""
    stem = name.removesuffix(f".{suffix}")
    if not re.fullmatch("[0-9]{5,12}", stem):
        return False
    return int(stem) < count and name == numbered(int(stem), count, suffix)


def _layout(there: dict[str, Any]) -> Layout:
    try:
        return Layout.model_validate(there.get("layout"))
    except ValidationError:
        return Layout()


def _promised(folder: Path) -> set[object]:
    """Names of images and shards in the lines of the folder."""
    lines = [line for name in (IMAGES, SHARDS) for line in journal.read(folder / name)]
    return {name for line in lines if isinstance(name := line.get("file"), str)}


def _is_ours(path: Path, folder: Path, promised: set[object]) -> bool:
    """Whether the content of a file with a name of ours is of our making."""
    if path.parent == folder / PREVIEW or (path.parent == folder and path.name in promised):
        return True
    content = _ends(path)
    # Zeros are what some file systems leave of a file in a power cut.
    if not content.strip(b"\0"):
        return True
    if path.name in KEYS:
        lines = [line for line in journal.read(path) if line]
        # Without a whole line, one that was torn must at least begin as ours do.
        return any(keys <= set(line) for line in lines for keys in KEYS[path.name]) or (
            not lines and content.startswith(b'{"')
        )
    if path.name in (SETTINGS, RUN):
        begun = content[: len(HEAD)]
        return begun == HEAD.encode()[: len(begun)] or _says_run(path)
    return MARKS.get(path.suffix, b"") in content


def _says_run(path: Path) -> bool:
    content = read_object(path)
    return content is not None and (is_run(content) or is_run(identity_of(content)))


def _ends(path: Path) -> bytes:
    """The beginning and the end of a file."""
    with path.open("rb") as file:
        begin = file.read(NEAR)
        file.seek(max(NEAR, path.stat().st_size - NEAR))
        return begin + file.read(NEAR)
