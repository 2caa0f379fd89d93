"""What the fuzzers share: a folder per case, and copies of the shipped bundle."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from cspd.engines.bundle import open_bundle
from cspd.export.cli import main
from cspd.runtime.commands.cli import shipped_bundle
from cspd.runtime.config import make_config
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions


class Arena:
    """Folders for cases: `fresh()` is an empty one, whose siblings must not change."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.source = root, source
        (root / "secret.txt").write_text("nobody writes here")
        self._folder = root / "case"

    def fresh(self) -> Path:
        """An empty folder; that of the case before is gone."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        return self._folder

    def bundle(self) -> Path:
        """The shipped bundle in a fresh folder; replace its files, never write into them."""
        folder = self.fresh() / "bundle"
        shutil.copytree(self.source, folder, copy_function=os.link)
        return folder


@pytest.fixture(scope="session")
def warm() -> None:
    """Do in the parent what libraries do once, such as imports and folders for their caches."""
    import cspd.runtime.triton.repository

    assert cspd.runtime.triton.repository
    CliRunner().invoke(main, ["inspect", str(shipped_bundle())])
    config = make_config(labels=[0], num_images=1, method="cspd", num_iter=1, head_steps=2)
    for backend in ("torch", "onnxruntime"):
        next(Pipeline(Sessions(open_bundle(shipped_bundle()), backend, threads=1)).generate(config))


@pytest.fixture
def arena(warm: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """Where the cases of one test happen."""
    source = tmp_path_factory.getbasetemp() / "shipped"
    if not source.exists():
        shutil.copytree(shipped_bundle(), source)
    yield Arena(tmp_path, source)
    shutil.rmtree(tmp_path, ignore_errors=True)
