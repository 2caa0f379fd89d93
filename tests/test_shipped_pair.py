"""The pair inside the package: intact, alike on both backends, drawing what it is asked for."""

import numpy as np
import pytest
import torch

from cspd.engines.bundle import open_bundle
from cspd.runtime.commands.cli import shipped_bundle
from cspd.runtime.config import make_config
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.tools.judge.metrics import score_images

QUICK = {"labels": tuple(range(10)), "num_iter": 10, "head_steps": 25, "cfg": 4.0}


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(shipped_bundle())


def pixels(bundle, backend: str = "onnxruntime", **options) -> np.ndarray:
    config = make_config(**QUICK, **options)
    batches = Pipeline(Sessions(bundle, backend, threads=1)).generate(config)
    return np.stack([image.pixels for images, _ in batches for image in images])


def test_files_are_those_of_the_manifest(bundle):
    for name in bundle.manifest.files:
        assert bundle.file(name).is_file()
    listed = {path for path in bundle.folder.rglob("*") if path.is_file()}
    assert listed == {bundle.folder / name for name in (*bundle.manifest.files, "manifest.json")}


def test_sizes(bundle):
    """Target 3 to 8 million parameters, draft at least six times smaller, 20 MB together."""
    records = [bundle.manifest.files[f"{role}/weights.safetensors"] for role in ("target", "draft")]
    target, draft = (record.bytes / 2 for record in records)  # float16, and a small header
    assert 3e6 < target < 8e6
    assert target > 6 * draft
    assert sum(record.bytes for record in records) < 20e6


@pytest.mark.parametrize("method", ["target", "cspd", "lossless"])
def test_onnxruntime_draws_what_pytorch_draws(bundle, method):
    options = {"method": method, "num_images": 4, "batch_size": 4, "window": 8}
    here, there = (pixels(bundle, name, **options) for name in ("onnxruntime", "torch"))
    assert np.abs(here.astype(int) - there.astype(int)).max() <= 1


@pytest.mark.parametrize(("method", "least"), [("target", 0.6), ("draft", 0.4)])
def test_images_show_their_class(bundle, method, least):
    """Chance is 0.1; the quick settings reach less than the README's."""
    drawn = pixels(bundle, method=method, num_images=100, batch_size=50)
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    score = score_images(images, torch.arange(100) % 10)
    assert score.accuracy >= least


def test_a_batch_may_be_larger_than_the_decoder_takes(bundle):
    limit = bundle.manifest.decoder.spec.axes["batch"].max
    options = {"num_iter": 1, "head_steps": 2}
    config = make_config(**{**QUICK, **options}, num_images=limit + 1, batch_size=limit + 1)
    ((images, _),) = Pipeline(Sessions(bundle, threads=1)).generate(config)
    assert [image.index for image in images] == list(range(limit + 1))
