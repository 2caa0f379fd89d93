"""A bundle in the layout of the Hugging Face cache: every file a link into a folder of blobs."""

import os
import shutil

from cspd.engines.bundle import hash_file, open_bundle
from cspd.runtime.config import make_config
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions


def cache_layout(bundle, hub):
    """The snapshot of `bundle` in a cache at `hub`."""
    blobs, snapshot = hub / "blobs", hub / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    for path in bundle.rglob("*"):
        if path.is_file():
            blob, link = blobs / hash_file(path).sha256, snapshot / path.relative_to(bundle)
            shutil.copyfile(path, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_images_are_those_of_the_bundle_itself(tiny_bundle, tmp_path):
    settings = make_config(
        labels=(1, 417), num_images=2, num_iter=2, head_steps=2, cfg=3.0, batch_size=2, gamma=4
    )
    linked = open_bundle(cache_layout(tiny_bundle.folder, tmp_path / "hub"))
    assert linked.sha256 == tiny_bundle.sha256
    for backend in ("onnxruntime", "torch"):
        (a, _), (b, _) = (
            next(Pipeline(Sessions(bundle, backend, threads=1)).generate(settings))
            for bundle in (tiny_bundle, linked)
        )
        assert [i.pixels.tobytes() for i in a] == [i.pixels.tobytes() for i in b]
