"""Opens the folder of a run: a new one, or one that goes on after every file was checked."""

from __future__ import annotations

import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cspd.engines.bundle import Bundle, hash_file
from cspd.engines.errors import CspdError
from cspd.runtime import journal
from cspd.runtime.config import RunConfig
from cspd.runtime.folder import (
    GRID,
    GRID_LIMIT,
    IMAGES,
    JOURNAL,
    PENDING,
    RUN,
    SHARDS,
    RunFolder,
)
from cspd.runtime.formats import Layout
from cspd.runtime.stats import TALLY

OURS = (
    r"(run\.json|images\.jsonl|shards\.jsonl|grid\.png|unfinished\.jsonl|samples\.npz"
    r"|[0-9]{5,}\.(png|tar|parquet))"
)
TEMPORARY = rf"\.{OURS}\.[0-9]+\.tmp|\.cspd-probe"


def open_run(
    folder: Path, config: RunConfig, bundle: Bundle, layout: Layout, *, overwrite: bool = False
) -> RunFolder:
    """The run of `config` in `folder`; its `record` is set if it was finished before.

    Raises CspdError if the folder cannot be written, is in use, or holds anything but this run;
    with `overwrite` any run may be there and is removed.
    """
    run = RunFolder(folder, config, bundle, layout)
    try:
        _check_writable(folder)
        run.lock = _lock(folder)
        _open(run, overwrite)
    except OSError as error:
        run.close()
        raise CspdError(
            f"{folder}: cannot write there: {error.strerror}; finished images in it are "
            "untouched; mend that, or choose another --out"
        ) from None
    except CspdError:
        run.close()
        raise
    return run


def _open(run: RunFolder, overwrite: bool) -> None:
    _remove_temporary(run.folder)
    found = list(run.folder.iterdir())
    journal_there, record = _first_line(run.folder / JOURNAL), _read_record(run.folder / RUN)
    if found and (overwrite or not (journal_there or record)):
        _clear(run.folder, found, overwrite, known=bool(journal_there or record))
        journal_there = record = None
    there = journal_there or (record and _identity_of(record))
    if there and (difference := _difference(there, run.identity)):
        kind = "an unfinished run" if journal_there else "a finished run"
        raise CspdError(
            f"{run.folder}: is not empty: it holds {kind} of another configuration "
            f"({difference}); choose another --out or add --overwrite"
        )
    if there:
        _load(run)
    if record and not journal_there and not run.missing:
        run.record = record
        return
    if not journal_there:
        journal.rewrite(run.folder / JOURNAL, [run.identity])
    run.pack_full()


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".cspd-probe"
    probe.touch()
    probe.unlink()


def _lock(folder: Path) -> int | None:
    """A lock on the folder that ends with this process; None where the file system has none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CspdError(f"{folder}: another run is writing there; choose another --out") from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_temporary(folder: Path) -> None:
    """Remove files that a kill left half written."""
    for path in (*folder.iterdir(), *(folder / PENDING).glob(".*")):
        if re.fullmatch(TEMPORARY, path.name):
            path.unlink()


def _first_line(path: Path) -> dict[str, Any] | None:
    """The identity at the head of a journal; None if there is none."""
    lines = journal.repair(path)
    return lines[0] if lines and "config" in lines[0] else None


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record of a finished run; None if there is none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _clear(folder: Path, found: list[Path], overwrite: bool, *, known: bool) -> None:
    """Remove the files of an earlier run; CspdError if that was not asked for, or is no run."""
    if not overwrite:
        raise CspdError(f"{folder}: is not empty; choose another --out or add --overwrite")
    if not known:
        raise CspdError(f"{folder}: holds files that are not a run; choose another --out")
    # What makes it a run goes last, so that a kill in between leaves one that can be overwritten.
    for path in sorted(
        [*found, *(folder / PENDING).glob("*.png")], key=lambda path: path.name in (JOURNAL, RUN)
    ):
        if re.fullmatch(OURS, path.name):
            path.unlink()
    if (folder / PENDING).is_dir() and not any((folder / PENDING).iterdir()):
        (folder / PENDING).rmdir()


def _identity_of(record: dict[str, Any]) -> dict[str, Any]:
    """The identity of a finished run, from its run.json."""
    bundle = record.get("bundle")
    sha256 = bundle.get("sha256") if isinstance(bundle, dict) else None
    return {name: record.get(name) for name in ("tool", "config", "layout")} | {"bundle": sha256}


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first setting in which two identities differ, in words; None if there is none."""
    old, new = _flat(there), _flat(here)
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            return f"{name} is {_short(old.get(name))} there, {_short(new.get(name))} here"
    return None


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, those of the inner parts among them."""
    flat = {name: value for name, value in identity.items() if not isinstance(value, dict)}
    for value in identity.values():
        flat |= value if isinstance(value, dict) else {}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _load(run: RunFolder) -> None:
    """Take over what lines promise and files keep."""
    names = {shard.name for shard in run.layout.shards(run.config.num_images)}
    for line in journal.repair(run.folder / SHARDS):
        name = line.get("file")
        if name in names and _intact(run.folder / name, line):
            run.packed[name] = line
    packed = {index for shard in run.finished_shards for index in shard.indices}
    # The grid is made of loose images, which wait for it even if their shard is there.
    loose = () if (run.folder / GRID).exists() else range(GRID_LIMIT)
    for line in journal.repair(run.folder / IMAGES):
        index = line.get("image")
        if type(index) is not int or not 0 <= index < run.config.num_images:
            continue
        if (index in packed and index not in loose) or _intact(run.image_path(index), line):
            run.lines[index] = line
    for line in journal.repair(run.folder / JOURNAL)[1:]:
        try:
            run.tally.add(TALLY.validate_python(line))
        except ValidationError:
            continue


def _intact(path: Path, line: journal.Line) -> bool:
    return path.is_file() and hash_file(path).sha256 == line.get("sha256")
