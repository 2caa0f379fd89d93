"""Shards as their readers see them, packed without holding them in memory."""

import hashlib
import io
import json
import sys
import tracemalloc

import numpy as np
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from cspd.engines.errors import CspdError
from cspd.runtime.store.formats import COUNTS, ROW_GROUP, Layout, Member, pack
from cspd.runtime.store.images import encode_png

COUNT, SIDE = 150, 8
ABOUT = {"tool": "1", "config": {"seed": 3}}


def pixels_of(index: int, side: int = SIDE, channels: int = 3) -> np.ndarray:
    """Noise, which does not compress."""
    shape = (side, side, channels)
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def members(count: int = COUNT, side: int = SIDE, channels: int = 3):
    for index in range(count):
        png = encode_png(pixels_of(index, side, channels), {"image": index})
        line = {
            "image": index, "file": f"{index:05d}.png",
            "label": index % 7, "class": f"c{index % 7}",
            "sha256": hashlib.sha256(png).hexdigest(), **dict.fromkeys(COUNTS, index),
        }  # fmt: skip
        yield Member(line, png)


def test_webdataset_is_read_by_its_own_library(tmp_path):
    digest = pack(tmp_path / "00000.tar", members(), COUNT, ABOUT)
    assert digest == hashlib.sha256((tmp_path / "00000.tar").read_bytes()).hexdigest()
    samples = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert len(samples) == COUNT
    for sample, member in zip(samples, members(), strict=True):
        assert sample["__key__"] == f"{member.line['image']:05d}"
        assert sample["png"] == member.png
        assert int(sample["cls"]) == member.line["label"]
        assert json.loads(sample["json"]) == member.line


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_that_of_adm(tmp_path, channels):
    pack(tmp_path / "samples.npz", members(channels=channels), COUNT, ABOUT)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    assert (images == np.stack([pixels_of(i, channels=channels) for i in range(COUNT)])).all()
    assert (labels == np.arange(COUNT) % 7).all()


def test_parquet(tmp_path):
    pack(tmp_path / "00000.parquet", members(), COUNT, ABOUT)
    file = pyarrow.parquet.ParquetFile(tmp_path / "00000.parquet")
    assert file.num_row_groups == -(-COUNT // ROW_GROUP)
    rows = file.read().to_pylist()
    assert len(rows) == COUNT
    for row, member in zip(rows, members(), strict=True):
        assert row["image"] == {"bytes": member.png, "path": member.line["file"]}
        assert row["index"] == member.line["image"]
        assert all(row[name] == member.line[name] for name in ("label", "class", "sha256", *COUNTS))
    with Image.open(io.BytesIO(rows[-1]["image"]["bytes"])) as image:
        assert (np.asarray(image) == pixels_of(COUNT - 1)).all()
    metadata = file.schema_arrow.metadata
    assert json.loads(metadata[b"cspd"]) == ABOUT
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert list(features) == file.schema_arrow.names and features["image"] == {"_type": "Image"}


@pytest.mark.parametrize("suffix", ["tar", "npz", "parquet"])
def test_bytes_depend_on_the_content_only(tmp_path, suffix):
    digests = {pack(tmp_path / f"{name}.{suffix}", members(), COUNT, ABOUT) for name in ("a", "b")}
    assert len(digests) == 1
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("suffix", ["tar", "npz", "parquet"])
def test_packing_holds_few_images_at_once(tmp_path, suffix):
    """Peak memory of Python stays far below the 15 MB of the images."""
    count, side = 1280, 64
    total = count * side * side * 3
    pack(tmp_path / f"warm.{suffix}", members(2), 2, ABOUT)
    tracemalloc.start()
    pack(tmp_path / f"x.{suffix}", members(count, side), count, ABOUT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / f"x.{suffix}").stat().st_size > total
    assert peak < total / 4


def test_failure_leaves_nothing(tmp_path):
    def broken():
        yield from members(3)
        raise OSError("gone")

    for suffix in ("tar", "npz", "parquet"):
        with pytest.raises(OSError, match="gone"):
            pack(tmp_path / f"x.{suffix}", broken(), 5, ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_shards_cover_every_image_once():
    assert Layout().shards(25) == []
    for layout in (Layout(format="webdataset", shard_size=10), Layout(format="parquet")):
        shards = layout.shards(25)
        assert [index for shard in shards for index in shard.indices] == list(range(25))
        assert all(len(shard.indices) <= layout.shard_size for shard in shards)
    (shard,) = Layout(format="npz", shard_size=10).shards(25)
    assert (shard.name, shard.first, shard.end) == ("samples.npz", 0, 25)


def test_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CspdError, match="pip install 'cspd\\[parquet\\]'"):
        Layout(format="parquet").check()
