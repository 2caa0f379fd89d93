"""CPUs that were granted: affinity and control groups of both versions, in fabricated trees."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cspd.engines.cpus import affinity, available_cpus, cpu_quota, limit_torch_threads

V1 = "34 25 0:30 {top} {point} rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
V2 = "30 23 0:26 {top} {point} rw,nosuid,nodev - cgroup2 cgroup2 rw,nsdelegate"
OTHERS = [
    "23 28 0:21 / /sys rw - sysfs sysfs rw",
    "35 25 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
    "no mount at all",
]


def tree(root: Path, groups: list[str], mounts: list[str], limits: dict[str, str]) -> Path:
    """A root with what /proc tells of `groups` and `mounts`, and files of control groups."""
    files = {
        "proc/self/cgroup": "\n".join(groups),
        "proc/self/mountinfo": "\n".join(mounts),
        **{f"sys/fs/cgroup/{name}": text for name, text in limits.items()},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v1(quota: int, period: int, folder: str = "") -> dict[str, str]:
    names = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period}
    return {f"cpu,cpuacct/{folder}{name}": str(value) for name, value in names.items()}


def unified(top: str = "/", point: str = "/sys/fs/cgroup") -> list[str]:
    return [*OTHERS, V2.format(top=top, point=point)]


def legacy(top: str = "/", point: str = "/sys/fs/cgroup/cpu,cpuacct") -> list[str]:
    return [*OTHERS, V1.format(top=top, point=point)]


# Groups of the process, mounts, files, and the CPUs that they grant.
TREES = {
    "v2": (["0::/job"], unified(), {"job/cpu.max": "150000 100000"}, 1.5),
    "v2 without a limit": (["0::/job"], unified(), {"job/cpu.max": "max 100000"}, None),
    "v2, a parent grants less": (
        ["0::/user/job/step"], unified(),
        {"user/cpu.max": "300000 100000", "user/job/cpu.max": "200000 100000",
         "user/job/step/cpu.max": "800000 100000"}, 2.0,
    ),
    "v2, only the root of the mount": (["0::/"], unified(), {"cpu.max": "50000 100000"}, 0.5),
    "v2, mounted from its own group": (
        ["0::/docker/1"], unified("/docker/1"), {"cpu.max": "400000 100000"}, 4.0,
    ),
    "v2, a path of the host": (
        ["0::/kubepods/pod/1"], unified("/elsewhere"), {"cpu.max": "100000 100000"}, 1.0,
    ),
    "v2, outside of its namespace": (
        ["0::/../other"], unified(), {"cpu.max": "100000 100000"}, 1.0,
    ),
    "v2, another period": (["0::/"], unified(), {"cpu.max": "30000 10000"}, 3.0),
    "v1": (["4:cpu,cpuacct:/job", "2:memory:/other"], legacy(), v1(250000, 100000, "job/"), 2.5),
    "v1 without a limit": (["4:cpu,cpuacct:/"], legacy(), v1(-1, 100000), None),
    "v1, a parent grants less": (
        ["4:cpu,cpuacct:/a/b"], legacy(), {**v1(100000, 50000), **v1(-1, 100000, "a/b/")}, 2.0,
    ),
    "v1, another controller": (["3:cpuset:/job"], legacy(), v1(100000, 100000, "job/"), None),
    "both, the less counts": (
        ["4:cpu,cpuacct:/", "0::/"],
        [*legacy(), V2.format(top="/", point="/sys/fs/cgroup/unified")],
        {**v1(300000, 100000), "unified/cpu.max": "200000 100000"}, 2.0,
    ),
    "a mount point with a space": (
        ["0::/"], unified(point="/sys/fs/cgroup/a\\040b"), {"a b/cpu.max": "200000 100000"}, 2.0,
    ),
    "nonsense": (["0::/", "", "x"], unified(), {"cpu.max": "many 0"}, None),
    "a period of zero": (["0::/"], unified(), {"cpu.max": "100 0"}, None),
    "no control groups": ([], OTHERS, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_quota_of_the_group_and_of_all_above_it(tmp_path, name):
    groups, mounts, limits, expected = TREES[name]
    root = tree(tmp_path, groups, mounts, limits)
    assert cpu_quota(root) == expected
    granted = affinity() if expected is None else min(affinity(), -int(-expected // 1))
    assert available_cpus(root) == max(granted, 1)


def test_without_proc_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None and available_cpus(tmp_path) == affinity()


def test_quota_is_rounded_up_and_never_more_than_the_affinity(tmp_path):
    """Half a CPU is one; a hundred are what the scheduler allows."""
    tree(tmp_path, ["0::/"], unified(), {"cpu.max": "50000 100000"})
    assert available_cpus(tmp_path) == 1
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("10000000 100000\n")
    assert available_cpus(tmp_path) == affinity() == len(os.sched_getaffinity(0))


def test_torch_keeps_fewer_threads_and_never_gets_more_than_available():
    before = torch.get_num_threads()
    try:
        limit_torch_threads(3)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        limit_torch_threads()
        assert torch.get_num_threads() == 1
        torch.set_num_threads(affinity() + 5)
        limit_torch_threads()
        assert torch.get_num_threads() == available_cpus()
    finally:
        torch.set_num_threads(before)


ONE_CORE = """
import os, sys
from pathlib import Path
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from cspd.engines.bundle import open_bundle
from cspd.engines.sessions.ort import ort_session
from cspd.runtime.commands.cli import shipped_bundle
bundle = open_bundle(shipped_bundle())
path, spec = str(bundle.graph_file("decoder")), bundle.graph("decoder").spec
count = lambda: len(list(Path("/proc/self/task").iterdir()))
ort_session(path, spec, threads=1)  # what the library starts once
started = []
for threads in (0, 3):
    before = count()
    session = ort_session(path, spec, threads=threads)
    started.append(count() - before)
print(started)
"""


def test_a_session_on_one_core_starts_no_thread():
    """The caller is the first thread: three on demand are two more, one core grants none."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_CORE], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[0, 2]", done.stderr


def test_nobody_else_counts_cores():
    root = Path(__file__).parents[2]
    parts = [root / part for part in ("engines", "export", "runtime", "tools")]
    counting = ("cpu_count(", "sched_getaffinity(")
    found = {
        path.name
        for part in parts
        for path in part.rglob("*.py")
        if any(word in path.read_text() for word in counting)
    }
    assert found == {"cpus.py"}
