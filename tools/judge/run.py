"""Make the images of an evaluation: class-balanced, in class order, as PNG, image by image.

The authors' protocol (LTH14/mar, engine_mar.py): image k of n shows class k // (n / classes),
pixels are rounded to 8 bits and go through PNG files before anything is measured.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from PIL import Image

from cspd.engines.errors import CspdError
from cspd.engines.spec import Record
from cspd.runtime.config import RunConfig
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.store import journal
from cspd.runtime.store.images import numbered, write_png

IMAGES = "images.jsonl"
SCHEMA = 1


class Variant(Record):
    """One set of images: a method with its settings and a seed.

    `setting` is what it is called in tables; equal for all seeds of a setting and for nothing else.
    """

    config: RunConfig
    setting: str

    @property
    def name(self) -> str:
        """A readable, unique folder name."""
        config = self.config
        settings = config.model_dump(mode="json", exclude={"labels"})
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return f"{config.method}-i{config.num_iter}-seed{config.seed}-{digest[:8]}"


def balanced_labels(num_images: int, num_classes: int) -> tuple[int, ...]:
    """Class of every image: equally many of each class, in class order.

    Raises CspdError unless the images divide evenly among the classes.
    """
    each, rest = divmod(num_images, num_classes)
    if rest or not each:
        raise CspdError(
            f"--num-images is {num_images}; every class gets equally many images, so it must be a "
            f"multiple of {num_classes}"
        )
    return tuple(label for label in range(num_classes) for _ in range(each))


def make_images(
    pipeline: Pipeline, variant: Variant, folder: Path, say: Callable[[str], None]
) -> float:
    """Write the missing images of `variant` to `folder`; returns the seconds it took.

    An image counts as there if its line in `images.jsonl` names the hash that its file has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = variant.config
    missing = sorted(set(range(config.num_images)) - set(intact(folder, config)))
    if not missing:
        return 0.0
    start, done = time.perf_counter(), config.num_images - len(missing)
    for images, _ in pipeline.generate(config, missing):
        with (folder / IMAGES).open("a") as lines:
            for image in images:
                path = folder / numbered(image.index, config.num_images, "png")
                write_png(path, image.pixels, _metadata(pipeline, config, image.index))
                lines.write(json.dumps(_line(config, image.index, _sha256(path))) + "\n")
        done += len(images)
        say(f"{variant.setting}, seed {config.seed}: {done}/{config.num_images} images")
    return time.perf_counter() - start


def intact(folder: Path, config: RunConfig) -> list[int]:
    """Numbers of the images of `config` in `folder` whose files are complete.

    Only these keep their lines, in which the hash alone is read and the rest follows from `config`.
    """
    found = {}
    for line in journal.repair(folder / IMAGES):
        index = line.get("image")
        if type(index) is not int or not 0 <= index < config.num_images:
            continue
        path = folder / numbered(index, config.num_images, "png")
        if path.is_file() and (sha256 := _sha256(path)) == line.get("sha256"):
            found[index] = _line(config, index, sha256)
    if (folder / IMAGES).exists():
        journal.rewrite(folder / IMAGES, found.values())
    return sorted(found)


def _line(config: RunConfig, index: int, sha256: str) -> journal.Line:
    return {"image": index, "label": config.label_of(index), "sha256": sha256}


def load_images(folder: Path, count: int) -> np.ndarray:
    """The `count` images of `folder`, read back from PNG: [N, H, W, C] uint8.

    The array lies in a file beside them: 50,000 images of ImageNet's size are 10 GB.
    """
    found: np.ndarray | None = None
    for index in range(count):
        with Image.open(folder / numbered(index, count, "png"), formats=["PNG"]) as image:
            array = np.atleast_3d(np.asarray(image))
        if found is None:
            shape = (count, *array.shape)
            found = open_memmap(folder / "pixels.npy", "w+", dtype=np.uint8, shape=shape)
        found[index] = array
    assert found is not None
    return found


def _metadata(pipeline: Pipeline, config: RunConfig, index: int) -> dict[str, Any]:
    """What the PNG says about itself; the labels of all images would be longer than the image."""
    settings = config.model_dump(mode="json", exclude={"labels"})
    label = config.label_of(index)
    return {"schema": SCHEMA, "image": index, "label": label, "config": settings,
            "bundle": pipeline.bundle.sha256, "evaluation": True}  # fmt: skip


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
