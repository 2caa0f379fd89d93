"""Shared fixtures: golden vectors, the tiny model, and its exported bundle (built once a run)."""

import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# Time is no test: a busy machine must not fail one. tests/fuzz has profiles of its own.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from fuzz_counts import (  # noqa: E402, F401 - hooks
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

torch.set_num_threads(1)

# Begun first, so that none of them is left for one process while the other idles. The first takes
# long and needs no shared bundle: meanwhile the other process builds the tiny one.
LONGEST = (
    "export/test_true_sizes.py", "runtime/store/test_resume.py", "export/test_build_killed.py",
    "runtime/serve/test_serve.py", "tools/judge/test_evaluate.py", "export/test_build.py",
    "runtime/scale/test_scale.py", "runtime/serve/test_gallery.py", "test_docs_python.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first, the others as they were; what needs a GPU only where one is."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
    names = {name: place for place, name in enumerate(LONGEST)}
    folder = Path(__file__).parent
    items.sort(key=lambda item: names.get(str(item.path.relative_to(folder)), len(names)))


@pytest.fixture(scope="session")
def golden_settings() -> dict:
    return json.loads((Path(__file__).parent / "golden" / "mar_tiny.json").read_text())


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`get(name, make)`: the folder that `make(folder)` filled, once for all processes of a run."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def get(name, make) -> Path:
        folder = root / f"shared-{name}"
        with (root / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "made").exists():
                # One that failed before says why; others try again and say so too.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                (folder / "made").touch()
        return folder

    return get


@pytest.fixture(scope="session")
def built_tiny(made_once) -> tuple[Path, Path]:
    """The tiny pair's bundle, and its unfinished build as it was before the last graph."""
    from tiny_pair import build_tiny

    def make(folder: Path) -> None:
        def report(message: str) -> None:
            if message.startswith("decoder"):
                shutil.copytree(folder / ".bundle.building", folder / "unfinished")

        build_tiny(folder / "bundle", report)

    folder = made_once("tiny", make)
    return folder / "bundle", folder / "unfinished"


@pytest.fixture(scope="session")
def tiny_bundle(built_tiny):
    """The opened bundle of the tiny pair; copy its folder before changing anything."""
    from cspd.engines.bundle import open_bundle

    return open_bundle(built_tiny[0])


@pytest.fixture(scope="session")
def hoisted_bundle(made_once):
    """The opened bundle of the tiny target in fp16 with engines, and so with hoisted graphs."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from hoisted_bundle import build_hoisted

    from cspd.engines.bundle import open_bundle

    return open_bundle(
        made_once("hoisted", lambda folder: build_hoisted(folder / "bundle")) / "bundle"
    )
