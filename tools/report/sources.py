"""Finished runs, as a report finds them on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cspd.engines.errors import CspdError
from cspd.runtime.store.seal import CHECK, is_sealed
from cspd.tools.bench.run import JOURNAL, read_lines
from cspd.tools.judge.evaluate import RESULT

PARITY, RUN = "parity.json", "run.json"


@dataclass(frozen=True)
class Source:
    """A finished run: its kind, its folder, and what it recorded."""

    kind: str
    folder: Path
    record: dict[str, Any]


def load_sources(paths: Iterable[Path]) -> list[Source]:
    """The runs in `paths`, folders or parity files; CspdError for anything else."""
    found = []
    for path in paths:
        here = [source for source in _sources_in(path)]
        if not here:
            raise CspdError(
                f"{path}: holds no results; expected the folder of cspd-run bench, evaluate or "
                "generate, or the file of cspd-export parity --out"
            )
        found += here
    return found


def _sources_in(path: Path) -> Iterable[Source]:
    if path.is_file():
        record = _read_json(path)
        if record.get("kind") == "parity":
            yield Source("parity", path.parent, record)
        return
    if (path / JOURNAL).is_file():
        yield Source("bench", path, {"lines": read_lines(path / JOURNAL)})
    for name, kind in ((RESULT, "evaluate"), (PARITY, "parity"), (RUN, "run")):
        if (path / name).is_file():
            record = _read_json(path / name)
            if kind == "run":
                _check_sum(path, record)
            yield Source(kind, path, record)


def _check_sum(folder: Path, record: dict[str, Any]) -> None:
    """Raise CspdError for a run.json that was changed; those of before had no checksum."""
    if CHECK in record and not is_sealed(record):
        raise CspdError(
            f"{folder / RUN}: was changed since the run wrote it (its checksum is wrong); the "
            f"cspd-run generate command of the run with --out {folder} writes it again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise CspdError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CspdError(f"{path}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise CspdError(f"{path}: not a record of ours")
    return record
