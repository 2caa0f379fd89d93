"""What would stop a build, looked at before its first graph."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from cspd.engines.atomic import free_disk, standing_parent
from cspd.engines.bundle import check_target
from cspd.engines.console.preflight import Check, check_disk, check_memory
from cspd.engines.errors import CspdError
from cspd.engines.manifest import Role
from cspd.engines.trt.build import check_buildable
from cspd.engines.trt.options import BuildOptions as EngineOptions
from cspd.export.build import staging_of
from cspd.export.estimates import Estimate
from cspd.export.pairs import weights_file


def place_checks(out: Path, overwrite: bool, engines: Iterable[EngineOptions]) -> Iterator[Check]:
    """Whether a bundle may be put at `out`, and whether its engines can be built here."""
    yield partial(check_target, out, overwrite)
    yield partial(check_parent, out)
    for options in engines:
        yield partial(check_buildable, options)


def weight_checks(
    presets: Mapping[Role, str], weights: Mapping[Role, Path | None], vae: Path | None,
    random_weights: bool,
) -> Iterator[Check]:  # fmt: skip
    """Whether every network has weights; what is in them is not looked at yet."""
    wanted = {} if random_weights else {presets[role]: weights[role] for role in presets}
    if vae is not None or not random_weights:
        wanted["kl16"] = vae
    for name, path in wanted.items():
        yield partial(weights_file, name, path)


def size_checks(estimate: Estimate, out: Path) -> Iterator[Check]:
    """Whether disk and memory hold what the build is estimated to take."""
    fewer = "choose another --out, or build fewer engines or a smaller pair"
    yield partial(check_disk, f"{out}: the bundle takes", estimate.disk_bytes, _free(out), fewer)
    smaller = "end other programs, build a smaller pair, or build on a larger machine"
    yield partial(check_memory, "the build takes about", estimate.least_memory_bytes, smaller)


def check_parent(out: Path) -> None:
    """Raise CspdError unless a folder can be made at `out`."""
    parent = standing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CspdError(
            f"{out}: cannot write there: {parent} takes no new folder; choose another --out"
        )


def _free(out: Path) -> int:
    """Bytes of disk where `out` is to be made, with what an unfinished build there holds."""
    kept = sum(path.stat().st_size for path in staging_of(out).rglob("*") if path.is_file())
    return free_disk(out) + kept
