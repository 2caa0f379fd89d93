"""What a bundle holds and what comes next, in the lines that `build` and `inspect` end with."""

from __future__ import annotations

from collections import Counter

from cspd.engines.bundle import Bundle
from cspd.engines.console.commands import human_bytes
from cspd.engines.manifest import Manifest
from cspd.engines.words import shell


def contents(manifest: Manifest) -> str:
    """Number and size of the files of a bundle."""
    size = sum(record.bytes for record in manifest.files.values())
    return f"{len(manifest.files)} files, {human_bytes(size)}"


def engines_of(manifest: Manifest) -> str:
    """Flavours of the engines, each with its number of graphs."""
    graphs = manifest.graphs().values()
    found = Counter(flavour for graph in graphs for flavour in graph.engines)
    return ", ".join(f"{flavour} for {n} graphs" for flavour, n in sorted(found.items())) or "none"


def next_step(bundle: Bundle) -> str:
    """The command that uses a bundle."""
    return f"next: cspd-run generate {shell(bundle.folder)}"
