"""One image again, from the settings inside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError, SettingError
from cspd.engines.machine import check_machine
from cspd.runtime.config import RunConfig, check_config
from cspd.runtime.pipeline import GeneratedImage, Pipeline
from cspd.runtime.sessions import Sessions
from cspd.runtime.store.images import read_metadata, to_pillow
from cspd.runtime.store.outputs import recorded_config

# Images that are made together at first: with one, prefix verification pads nothing.
FEW = 2
# Images that a replay pads to at most, as the run did, if the pixels differ without.
MOST = 64


def replay(
    bundle: Bundle, path: Path, *, device: str, threads: int
) -> tuple[GeneratedImage, RunConfig, bool]:
    """Make the image of `path` again; returns it, its settings, and whether it is the same.

    The same means: the same pixels in the same mode. A batch was padded to its size, and kernels
    may round by the shape of a call, which is all that the padding can change. So the image is made
    with little padding first, and with that of its run only if the pixels differ and up to `MOST`.
    """
    config, index = _settings(bundle, path)
    with Image.open(path) as stored:
        mode, pixels = _mode(stored), np.asarray(stored)
    expected = _made_mode(bundle)
    if mode != expected:
        raise CspdError(
            f"{path}: its pixels are stored as {mode}, cspd-run writes {expected}, so it was "
            "encoded again; identical means the same pixels in the same mode: replay the original"
        )
    check_machine(bundle, config.backend, device)
    pipeline = Pipeline(Sessions(bundle, config.backend, device, threads))
    sizes = {min(config.batch_size, FEW), min(config.batch_size, MOST)}
    for size in sorted(sizes):
        images, _ = next(pipeline.generate(padded_to(config, size), [index]))
        made = images[0]
        same = np.array_equal(np.asarray(to_pillow(made.pixels)), pixels)
        if same:
            break
    return made, config, same


def padded_to(config: RunConfig, size: int) -> RunConfig:
    """`config` with batches of `size`, whose heads speculate for the same tokens of an image."""
    if size == config.batch_size:
        return config
    heads = tuple(
        choice.model_copy(update={"up_to": choice.up_to // config.batch_size * size})
        for choice in config.heads
    )
    return config.model_copy(update={"batch_size": size, "heads": heads})


def _settings(bundle: Bundle, path: Path) -> tuple[RunConfig, int]:
    """Settings and number of the image in `path`; CspdError unless `bundle` made it."""
    metadata = read_metadata(path)
    if metadata.get("bundle") != bundle.sha256:
        raise CspdError(
            f"{path}: was made with bundle {str(metadata.get('bundle'))[:12]}, this one is "
            f"{bundle.sha256[:12]}; name the bundle it was made with: cspd-run replay IMAGE BUNDLE"
        )
    config = recorded_config(metadata, path)
    try:
        check_config(config, bundle.manifest)
    except SettingError as error:
        # What stands in a file is no option that somebody typed.
        raise CspdError(f"{path}: its settings are not valid: {error}") from None
    index = metadata.get("image")
    if type(index) is not int:
        raise CspdError(f"{path}: its settings are not valid: image is {index!r:.20}, no number")
    if not 0 <= index < config.num_images:
        raise CspdError(f"{path}: image {index}, expected 0..{config.num_images - 1}")
    return config, index


def _mode(image: Image.Image) -> str:
    """The mode of an image in words that tell transparency and animation too."""
    extras = ("transparency" in image.info, getattr(image, "n_frames", 1) > 1)
    words = [word for word, there in zip(("transparency", "frames"), extras, strict=True) if there]
    return " with ".join([image.mode, *words])


def _made_mode(bundle: Bundle) -> str:
    """The mode of the images of `bundle`."""
    channels = bundle.manifest.geometry.image_channels
    return to_pillow(np.zeros((1, 1, channels), dtype=np.uint8)).mode
