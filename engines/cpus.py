"""How many CPUs this process may use: not what the machine has, but what it was granted."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch


def available_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use, at least 1: those of its affinity, within `cpu_quota`."""
    quota = cpu_quota(root)
    return affinity() if quota is None else max(1, min(affinity(), math.ceil(quota)))


def affinity() -> int:
    """CPUs that the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # systems without affinity


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs worth of time that control groups grant, the least of this one and all above it.

    Of cgroup v1 and v2, whichever are mounted. None without a limit. `root` is what the paths of
    /proc and of mount points begin with.
    """
    granted = [quota for folder in _groups(root) if (quota := _quota(folder)) is not None]
    return min(granted, default=None)


def limit_torch_threads(threads: int = 0) -> None:
    """Give PyTorch `threads`; with 0 what it has now, but no more than are available."""
    torch.set_num_threads(threads or min(torch.get_num_threads(), available_cpus()))


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy of control groups: the group `top` is what lies at `point`."""

    top: PurePosixPath
    point: Path

    def folders(self, group: PurePosixPath) -> list[Path]:
        """Folders of `group` and of all groups above it that are visible here."""
        inner = group.relative_to(self.top)
        return [self.point / part for part in (inner, *inner.parents)]


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, for both versions."""
    groups = _lines(root / "proc/self/cgroup")
    mounts = _lines(root / "proc/self/mountinfo")
    for line in groups:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/") or (controllers and "cpu" not in controllers.split(",")):
            continue
        group, found = PurePosixPath(path), _mounts(mounts, root, unified=not controllers)
        seen = ".." not in group.parts
        inside = [mount for mount in found if seen and group.is_relative_to(mount.top)]
        for mount in inside:
            yield from mount.folders(group)
        if not inside:
            # A container that sees a path of its host: its own group is what is mounted.
            yield from (mount.point for mount in found)


def _mounts(lines: list[str], root: Path, *, unified: bool) -> list[_Mount]:
    """Where cgroup v2 (`unified`), or the cpu controller of v1, is mounted."""
    mounts = []
    for line in lines:
        before, _, after = line.partition(" - ")
        place, kind = before.split(), after.split()
        if len(place) < 5 or len(kind) < 3:
            continue
        legacy = kind[0] == "cgroup" and "cpu" in kind[2].split(",")
        if kind[0] == "cgroup2" if unified else legacy:
            top, point = (_unescaped(name) for name in place[3:5])
            mounts.append(_Mount(PurePosixPath(top), root / point.lstrip("/")))
    return mounts


def _unescaped(name: str) -> str:
    """A path of mountinfo, which writes spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def _quota(folder: Path) -> float | None:
    """CPUs that the group of `folder` itself is limited to."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        words = [word for name in names for line in _lines(folder / name) for word in line.split()]
        with contextlib.suppress(ValueError):  # "max", or no numbers at all
            quota, period = (int(word) for word in words)
            if quota > 0 and period > 0:
                return quota / period
    return None


def _lines(path: Path) -> list[str]:
    """Lines of a small file; none if it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
