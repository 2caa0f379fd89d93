"""Runs of the command line: a folder of images, the target to compare, one image again."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.runtime.batches import FinishedBatch, encode, timed_batches
from cspd.runtime.config import RunConfig, check_config
from cspd.runtime.folder import RunFolder
from cspd.runtime.formats import Layout
from cspd.runtime.images import read_metadata
from cspd.runtime.outputs import run_record
from cspd.runtime.pipeline import GeneratedImage, Pipeline
from cspd.runtime.progress import RunProgress
from cspd.runtime.resume import open_run
from cspd.runtime.stats import Tally
from cspd.runtime.stopping import StopWish


@dataclass(frozen=True)
class Outcome:
    """What one run measured."""

    config: RunConfig
    tally: Tally


@dataclass(frozen=True)
class Machine:
    """What runs the networks: `threads` 0 leaves their number to the backend."""

    device: str = "cpu"
    threads: int = 0


def generate(
    bundle: Bundle, config: RunConfig, out: Path, *, machine: Machine, layout: Layout,
    overwrite: bool, baseline: bool, quiet: bool,
) -> tuple[dict[str, Any], list[Outcome]]:  # fmt: skip
    """Generate the images that `out` lacks; returns `run.json` and the measured outcomes.

    With `baseline` the target alone is run too, on the same sessions and noise, and not saved.
    A run that is finished already returns its record and no outcome. Raises Interrupted when a
    signal asked to stop; images in flight were finished and written.
    """
    check_config(config, bundle.manifest)
    layout.check()
    pipeline = Pipeline(bundle, config.backend, machine.device, machine.threads)
    pipeline.open(config)
    opened = open_run(out, config, bundle, layout, overwrite=overwrite)
    with opened as folder, StopWish() as stop:
        if folder.record is not None:
            return folder.record, []
        write_missing(pipeline, folder, stop, quiet)
        outcomes = [Outcome(config, folder.tally)]
        record = run_record(config, bundle, folder.tally) | {"layout": folder.identity["layout"]}
        if baseline and config.method != "target":
            plain = config.model_copy(update={"method": "target"})
            outcomes.append(measure(pipeline, plain, stop, quiet))
            record["baseline"] = _compare(*outcomes)
        folder.finish(record)
    return record, outcomes


def write_missing(pipeline: Pipeline, folder: RunFolder, stop: StopWish, quiet: bool) -> None:
    """Make every image that `folder` lacks; opening the sessions is not part of the time."""
    config, missing = folder.config, folder.missing
    done = config.num_images - len(missing)
    with RunProgress(config.method, config.num_images, quiet, done=done) as progress:
        progress.begin_batch(min(config.batch_size, len(missing)))
        for images, tally in timed_batches(pipeline, config, missing, progress.on_step):
            files = [encode(config, folder.bundle, image) for image in images]
            folder.add(FinishedBatch(files, tally, os.getpid()))
            progress.advance(len(images))
            progress.begin_batch(config.batch_size)
            stop.check(folder.state)


def measure(pipeline: Pipeline, config: RunConfig, stop: StopWish, quiet: bool) -> Outcome:
    """Generate every image of `config` without keeping any."""
    pipeline.open(config)
    total = Tally()
    with RunProgress(config.method, config.num_images, quiet) as progress:
        progress.begin_batch(min(config.batch_size, config.num_images))
        everything = list(range(config.num_images))
        for images, tally in timed_batches(pipeline, config, everything, progress.on_step):
            total.add(tally)
            progress.advance(len(images))
            progress.begin_batch(config.batch_size)
            stop.check("measuring the target alone")
    return Outcome(config, total)


def _compare(outcome: Outcome, target: Outcome) -> dict[str, Any]:
    """The target alone against the method, per image."""
    ours, plain = outcome.tally, target.tally
    ratio = plain.seconds / plain.images / (ours.seconds / ours.images) if ours.images else None
    return {"method": "target", "seconds": plain.seconds, "speed_ratio": ratio}


def replay(bundle: Bundle, path: Path, *, device: str, threads: int) -> tuple[GeneratedImage, bool]:
    """Make the image of `path` again; returns it and whether its pixels are the same."""
    metadata = read_metadata(path)
    if metadata.get("bundle") != bundle.sha256:
        raise CspdError(
            f"{path}: was made with bundle {str(metadata.get('bundle'))[:12]}, this one is "
            f"{bundle.sha256[:12]}; name the bundle it was made with: cspd-run replay IMAGE BUNDLE"
        )
    try:
        config = RunConfig.model_validate(metadata.get("config"))
    except ValidationError as error:
        raise CspdError(
            f"{path}: its settings are not valid: {str(error).splitlines()[0]}"
        ) from None
    index = metadata.get("image")
    if type(index) is not int or not 0 <= index < config.num_images:
        raise CspdError(f"{path}: image {index!r:.20}, expected 0..{config.num_images - 1}")
    pipeline = Pipeline(bundle, config.backend, device, threads)
    images, _ = next(pipeline.generate(config, [index]))
    with Image.open(path) as stored:
        expected = np.asarray(stored)
    got = images[0].pixels[..., 0] if images[0].pixels.shape[-1] == 1 else images[0].pixels
    return images[0], _digest(got) == _digest(expected)


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
