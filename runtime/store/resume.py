"""Opens the folder of a run: a new one, or one that is resumed after every file was checked."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cspd.engines.atomic import check_folder
from cspd.engines.bundle import Bundle, hash_file
from cspd.engines.errors import CspdError
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.stats import Tally, read_tally
from cspd.runtime.store import journal
from cspd.runtime.store.folder import GRID_LIMIT, RunFolder
from cspd.runtime.store.formats import Layout
from cspd.runtime.store.outputs import RUN_SCHEMA
from cspd.runtime.store.ownership import (
    GRID,
    IMAGES,
    JOURNAL,
    PENDING,
    PREVIEW,
    RUN,
    SETTINGS,
    SHARDS,
    is_run,
    listed,
    read_object,
    refuse_foreign,
    run_files,
)
from cspd.runtime.store.record import is_believable
from cspd.runtime.store.seal import CHECK, identity_of

OURS = (
    r"((settings|run)\.json|(images|shards|unfinished)\.jsonl|grid\.png|samples\.npz"
    r"|[0-9]{5,}\.(png|tar|parquet))"
)
TEMPORARY = rf"\.{OURS}\.[0-9]+\.tmp|\.cspd-probe"
# What systems leave in folders that their users take for empty.
CLUTTER = (
    r"lost\+found|\.DS_Store|\._.*|\.localized|\.fseventsd|\.Spotlight-V100|Thumbs\.db|desktop\.ini"
    r"|System Volume Information|\$RECYCLE\.BIN|\.directory|\.Trash.*|\.nfs[0-9a-f]+|\.snapshot"
    r"|@eaDir|\.git(keep|ignore)"
)


def open_run(
    folder: Path,
    config: RunConfig,
    bundle: Bundle,
    layout: Layout,
    *,
    choices: dict[str, str] | None = None,
    overwrite: bool = False,
) -> RunFolder:
    """The run of `config` in `folder`; its `record` is set if it was finished before.

    `choices` are kept with the settings of a new run; those of an old one come from its folder.
    Raises CspdError if the folder cannot be written, is in use, or holds anything but this run;
    with `overwrite` any run may be there and is removed.
    """
    run = RunFolder(folder, config, bundle, layout, choices=choices or {})
    try:
        _check_writable(folder)
        run.lock = _lock(folder)
        _open(run, overwrite)
    except OSError as error:
        run.close()
        raise CspdError(
            f"{folder}: cannot write there: {error.strerror}; finished images in it are "
            "untouched; fix that, or choose another --out"
        ) from None
    except CspdError:
        run.close()
        raise
    return run


def recorded(
    folder: Path, config: RunConfig, bundle: Bundle, layout: Layout
) -> tuple[RunConfig, dict[str, str]] | None:
    """The settings of the run in `folder` and its reasons, if it is the one that `config` asks for.

    They differ from `config` in the heads that measured costs chose: costs that were measured since
    must not stop a run that began with others. None if the folder holds nothing of the kind.
    """
    for there in (read_object(folder / SETTINGS), _begun(read_object(folder / RUN))):
        try:
            old = RunConfig.model_validate((there or {}).get("config"))
        except ValidationError:
            continue
        wanted = config.model_copy(update={"heads": config.heads or old.heads})
        if there and not _difference(there, RunFolder(folder, wanted, bundle, layout).identity):
            return wanted, _choices(there)
    return None


def _open(run: RunFolder, overwrite: bool) -> None:
    folder = run.folder
    _refuse_links(folder)
    record = read_object(folder / RUN)
    there = _there(run, record)
    found = _found(folder)
    if found and there is None:
        raise CspdError(
            f"{folder}: is not empty: it holds files that are not a run "
            f"({listed(folder, found)}); choose another --out"
        )
    if there is not None:
        if not overwrite:
            _check_same(run, there, finished=record is not None)
        owned = run_files(folder, there)
        refuse_foreign(folder, owned, run.identity)
        if overwrite:
            _clear(folder, owned)
            there = record = None
    _remove_temporary(folder)
    if there is not None:
        run.choices = _choices(there)
        _load(run)
    if record is not None and _whole(run, record):
        run.record = record
    if there is None or read_object(folder / SETTINGS) != there:
        run.begin()
    if run.record is None:
        run.pack_full()


def _found(folder: Path) -> list[Path]:
    """What is in the folder, but for what systems and killed runs leave in one that is empty."""
    passing = f"{CLUTTER}|{TEMPORARY}"
    return [path for path in folder.iterdir() if not re.fullmatch(passing, path.name)]


def _there(run: RunFolder, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """Which run the folder holds: this one if any of its records says so; None if it holds none."""
    settings, head = read_object(run.folder / SETTINGS), _old_head(run.folder)
    found = [there for there in (settings, _begun(record), head) if there and is_run(there)]
    same = (there for there in found if not _difference(there, run.identity))
    return next(same, found[0] if found else None)


def _check_same(run: RunFolder, there: dict[str, Any], *, finished: bool) -> None:
    """Raise CspdError unless `there` is the identity of `run`."""
    if there.get("schema") != RUN_SCHEMA:
        raise CspdError(
            f"{run.folder}: is not empty: it holds a run in the format of another version of cspd "
            f"({_short(there.get('schema', 1))}, this one writes {RUN_SCHEMA}); its images stay as "
            "they are: choose another --out, or add --overwrite to make them again"
        )
    if difference := _difference(there, run.identity):
        kind = "a finished run" if finished else "an unfinished run"
        raise CspdError(
            f"{run.folder}: is not empty: it holds {kind} of another configuration "
            f"({difference}); choose another --out or add --overwrite"
        )


def _whole(run: RunFolder, record: dict[str, Any]) -> bool:
    """Whether `record` is that of `run`, nothing is missing, and nothing changed since."""
    if run.missing or _difference(identity_of(record), run.identity):
        return False
    if (run.folder / JOURNAL).exists() or not (run.folder / GRID).exists():
        return False
    if not is_believable(record, run.config, run.bundle):
        return False
    if record.get("files") != run.line_hashes():
        # What was changed in a line is derived again; a record that agrees with that stays.
        run.rewrite_lines()
    return record.get("files") == run.line_hashes()


def _refuse_links(folder: Path) -> None:
    """Raise CspdError for a link, or anything but a file, where a run has a file of its own."""
    inner = (folder / PENDING, folder / PREVIEW)
    for path in inner:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CspdError(f"{path}: is not a folder of a run; remove it or choose another --out")
    for path in (*folder.iterdir(), *(path for part in inner for path in part.glob("*"))):
        if re.fullmatch(OURS, path.name) and not stat.S_ISREG(path.lstat().st_mode):
            raise CspdError(
                f"{path}: is a link or no file at all, and nothing is written through those; "
                "remove it or choose another --out"
            )


def _check_writable(folder: Path) -> None:
    check_folder(folder)
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
    inner = ((folder / PENDING).glob(".*"), (folder / PREVIEW).glob(".*"))
    for path in (*folder.iterdir(), *(path for part in inner for path in part)):
        if re.fullmatch(TEMPORARY, path.name):
            path.unlink()


def _old_head(folder: Path) -> dict[str, Any] | None:
    """The identity at the head of a journal, where it stood before version 2; None elsewhere."""
    lines = journal.read(folder / JOURNAL)
    return lines[0] if lines and "config" in lines[0] else None


def _choices(there: dict[str, Any]) -> dict[str, str]:
    """The reasons in the settings of a run."""
    found = there.get("choices")
    found = found if isinstance(found, dict) else {}
    return {role: reason for role, reason in found.items() if isinstance(reason, str)}


def _clear(folder: Path, owned: list[Path]) -> None:
    """Remove the files of an earlier run, and its folders if nothing else is in them."""
    # What makes it a run goes last, and its lines before that, which say what else is its own: so a
    # kill in between leaves one that can be overwritten.
    last = (IMAGES, SHARDS, JOURNAL, RUN, SETTINGS)
    for path in sorted(owned, key=lambda path: last.index(path.name) if path.name in last else -1):
        path.unlink()
    for part in (folder / PENDING, folder / PREVIEW):
        if part.is_dir() and not any(part.iterdir()):
            part.rmdir()


def _begun(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """The settings of a finished run and its choices, from its run.json."""
    return None if record is None else identity_of(record) | {"choices": _choices(record)}


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first setting in which two identities differ, in words; None if there is none."""
    old, new = _flat({name: there.get(name) for name in here}), _flat(here)
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
    shards = {shard.name: shard for shard in run.layout.shards(run.config.num_images)}
    for found in journal.repair(run.folder / SHARDS):
        name = found.get("file")
        shard = shards.get(name) if isinstance(name, str) else None
        line = run.read_shard_line(shard, found) if shard else None
        if line is not None and _intact(run.folder / line["file"], line):
            run.packed[line["file"]] = line
    packed = {index for shard in run.finished_shards for index in shard.indices}
    # The grid is made of loose images, which wait for it even if their shard is there.
    loose = () if (run.folder / GRID).exists() else range(GRID_LIMIT)
    for found in journal.repair(run.folder / IMAGES):
        line = run.read_image_line(found)
        if line is None:
            continue
        index = line["image"]
        if (index in packed and index not in loose) or _intact(run.image_path(index), line):
            run.lines[index] = line
    for found in journal.repair(run.folder / JOURNAL):
        if (tally := _tally(run, found)) is not None:
            run.tally.add(tally)


def _tally(run: RunFolder, found: journal.Line) -> Tally | None:
    """The counts of a batch; None unless they are what this run wrote."""
    counts = {name: value for name, value in found.items() if name != CHECK}
    return read_tally(counts) if run.sealed(counts) == found else None


def _intact(path: Path, line: journal.Line) -> bool:
    return path.is_file() and hash_file(path).sha256 == line["sha256"]
