"""Weights cut into shards, as `save_pretrained` stores them: an index that names a file per tensor.

The index is believed in nothing: it may name files beside itself only, and what each of them holds
must be what it says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cspd.engines.errors import CspdError
from cspd.export.weights.files import (
    WeightFile,
    check_count,
    few,
    read_weights,
    regular_size,
)

INDEX_SUFFIX = ".index.json"
MAX_INDEX = 4 << 20  # bytes: 200 a name, for as many names as a file may hold


def is_index(path: Path) -> bool:
    """Whether `path` is named as an index of shards."""
    return path.name.endswith(INDEX_SUFFIX)


def read_shards(path: Path) -> WeightFile:
    """All tensors of the shards that the index `path` names, which lie beside it.

    Raises CspdError if a shard is missing or lies elsewhere, if a tensor is in two shards, and if a
    shard holds other tensors than the index says.
    """
    places = _weight_map(path)
    shards = [path.parent / name for name in sorted(set(places.values()))]
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise CspdError(
            f"{path}: {len(missing)} of {len(shards)} shards are missing ({few(missing)}); "
            "download them into the same folder"
        )
    files = [read_weights(shard) for shard in shards]
    tensors: dict[str, Any] = {}
    for file in files:
        held = file.content if isinstance(file.content, dict) else {}
        _check_shard(file.path, held, tensors, places)
        tensors.update(held)
    forms = {file.form for file in files}
    return WeightFile(
        path, tensors, "pickle" if "pickle" in forms else "safetensors", tuple(shards)
    )


def _check_shard(
    shard: Path, held: dict[str, Any], before: dict[str, Any], places: dict[str, str]
) -> None:
    """Raise CspdError unless `held` are the tensors that the index gives to `shard`."""
    expected = {name for name, place in places.items() if place == shard.name}
    twice = [name for name in held if name in before]
    for names, problem in (
        (twice, "are in another shard too"),
        ([name for name in expected if name not in held], "are missing, the index has them here"),
        ([name for name in held if name not in expected], "are not in the index"),
    ):
        if names:
            raise CspdError(
                f"{shard}: {len(names)} tensors {problem} ({few(names)}); download the shards "
                "and their index again, from one place"
            )


def _weight_map(path: Path) -> dict[str, str]:
    """Name of the shard of each tensor; all of them plain file names."""
    if (size := regular_size(path)) > MAX_INDEX:
        raise CspdError(f"{path}: an index of {size:,} bytes, expected at most {MAX_INDEX:,}")
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise CspdError(f"{path}: not an index of shards ({error}); download it again") from error
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places:
        raise CspdError(f"{path}: not an index of shards: no 'weight_map' of names to files")
    check_count(len(places), path)
    for name, shard in places.items():
        if not _is_file_name(shard):
            raise CspdError(
                f"{path}: the shard of {name} is {shard!r}, expected the name of a file beside the "
                "index; get the index from the authors of the weights"
            )
    return places


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no name may stand twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands in it twice")
        found[name] = value
    return found


def _is_file_name(name: Any) -> bool:
    """Whether `name` is a plain file name on any system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and 0 < len(name) <= 200
        and not name.startswith(".")
        and not set(name) & set("/\\:")
    )
