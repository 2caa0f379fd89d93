"""Checksums that hold for one run alone: of its lines, and of its record."""

from __future__ import annotations

import hashlib
import json
from typing import Any

CHECK = "check"  # key of a checksum


def identity_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a finished run has in common with those that resume it, from its `run.json`."""
    bundle = record.get("bundle")
    sha256 = bundle.get("sha256") if isinstance(bundle, dict) else None
    names = ("schema", "tool", "config", "layout")
    return {name: record.get(name) for name in names} | {"bundle": sha256}


def key_of(identity: dict[str, Any]) -> bytes:
    """What goes into every checksum of a run."""
    return hashlib.sha256(_canonical(identity)).digest()


def seal(key: bytes, content: dict[str, Any]) -> dict[str, Any]:
    """`content` with its checksum for the run of `key`."""
    return content | {CHECK: hashlib.sha256(key + _canonical(content)).hexdigest()[:16]}


def is_sealed(record: dict[str, Any]) -> bool:
    """Whether a `run.json` holds what was written, by its checksum."""
    content = {name: value for name, value in record.items() if name != CHECK}
    try:
        sealed = seal(key_of(identity_of(record)), content)
    except RecursionError:
        return False
    return sealed[CHECK] == record.get(CHECK)


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
