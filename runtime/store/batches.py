"""Finished batches: images as the bytes of their files, and what making them took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from cspd.engines.bundle import Bundle
from cspd.engines.sessions.session import CallStats
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.decoder import OnRound, ignore_progress
from cspd.runtime.decode.stats import Statistics, Tally, Verdicts
from cspd.runtime.pipeline import GeneratedImage, Pipeline
from cspd.runtime.store.images import encode_png
from cspd.runtime.store.outputs import image_metadata


@dataclass(frozen=True)
class ImageFile:
    """One image as the bytes of its PNG."""

    index: int
    png: bytes
    verdicts: Verdicts


@dataclass(frozen=True)
class FinishedBatch:
    """Images that were computed together. `process` is the id of the process that did it."""

    files: list[ImageFile]
    tally: Tally
    process: int


def encode(config: RunConfig, bundle: Bundle, image: GeneratedImage) -> ImageFile:
    """The file of one image: the same bytes wherever it is made."""
    png = encode_png(image.pixels, image_metadata(config, bundle, image))
    return ImageFile(image.index, png, image.verdicts)


def timed_batches(
    pipeline: Pipeline,
    config: RunConfig,
    indices: list[int],
    on_step: OnRound = ignore_progress,
) -> Iterator[tuple[list[GeneratedImage], Tally]]:
    """Batches of the images `indices`, each with its time and calls."""
    return timed(pipeline, pipeline.generate(config, indices, on_step))


def timed(
    pipeline: Pipeline, batches: Iterator[tuple[list[GeneratedImage], Statistics]]
) -> Iterator[tuple[list[GeneratedImage], Tally]]:
    """`batches` of `pipeline`, each with its time and calls."""
    while True:
        before = {
            name: (stats.calls, stats.seconds) for name, stats in pipeline.sessions.calls.items()
        }
        start = time.perf_counter()
        batch = next(batches, None)
        seconds = time.perf_counter() - start
        if batch is None:
            return
        images, statistics = batch
        calls = {
            name: CallStats(stats.calls - before[name][0], stats.seconds - before[name][1])
            for name, stats in pipeline.sessions.calls.items()
        }
        calls = {name: stats for name, stats in calls.items() if stats.calls}
        # Verdicts of single images are in `images` already.
        statistics.per_image = []
        yield images, Tally(len(images), seconds, statistics, calls)
