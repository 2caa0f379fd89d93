"""Runs of the command line: a folder of images, the target to compare, one image again."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.session import CallStats
from cspd.runtime.config import RunConfig, check_config
from cspd.runtime.images import read_metadata
from cspd.runtime.outputs import RunFolder, prepare_folder, run_record
from cspd.runtime.pipeline import GeneratedImage, Pipeline
from cspd.runtime.progress import RunProgress
from cspd.runtime.stats import Statistics


@dataclass(frozen=True)
class Outcome:
    """What one run measured."""

    config: RunConfig
    statistics: Statistics
    seconds: float
    calls: dict[str, CallStats]


def run_images(
    pipeline: Pipeline, config: RunConfig, folder: RunFolder | None, quiet: bool
) -> Outcome:
    """Generate every image of `config`; opening the sessions is not part of the time."""
    check_config(config, pipeline.bundle.manifest)
    pipeline.open(config)
    before = {name: (stats.calls, stats.seconds) for name, stats in pipeline.calls.items()}
    total, seconds = Statistics(), 0.0
    with RunProgress(config.method, config.num_images, quiet) as progress:
        progress.begin_batch(min(config.batch_size, config.num_images))
        start = time.perf_counter()
        for images, statistics in pipeline.generate(config, on_step=progress.on_step):
            seconds += time.perf_counter() - start
            for image in images if folder else []:
                folder.add(image)  # type: ignore[union-attr]
            total.add(statistics)
            progress.advance(len(images))
            progress.begin_batch(config.batch_size)
            start = time.perf_counter()
    calls = {
        name: CallStats(stats.calls - before[name][0], stats.seconds - before[name][1])
        for name, stats in pipeline.calls.items()
    }
    return Outcome(config, total, seconds, {n: c for n, c in calls.items() if c.calls})


def generate(
    bundle: Bundle, config: RunConfig, out: Path, *, device: str, threads: int, overwrite: bool,
    baseline: bool, quiet: bool,
) -> tuple[dict[str, Any], list[Outcome]]:  # fmt: skip
    """Generate images into `out`; returns the contents of `run.json` and the measured outcomes.

    With `baseline` the target alone is run too, on the same sessions and noise, and not saved.
    """
    check_config(config, bundle.manifest)
    pipeline = Pipeline(bundle, config.backend, device, threads)
    config, chosen = pipeline.resolve(config)
    for role, explained in chosen.items():
        Console(stderr=True, quiet=quiet).print(f"{role} head: {explained.reason}")
    pipeline.open(config)
    prepare_folder(out, overwrite)
    folder = RunFolder(out, config, bundle)
    outcomes = [run_images(pipeline, config, folder, quiet)]
    if baseline and config.method != "target":
        plain = config.model_copy(
            update={"method": "target", "head": None, "heads": (), "relax": None}
        )
        outcomes.append(run_images(pipeline, plain, None, quiet))
    record = run_record(
        config, bundle, outcomes[0].statistics, outcomes[0].seconds, outcomes[0].calls
    )
    if chosen:
        record["choices"] = {role: explained.reason for role, explained in chosen.items()}
    if len(outcomes) > 1:
        record["baseline"] = {
            "method": "target",
            "seconds": outcomes[1].seconds,
            "speed_ratio": outcomes[1].seconds / outcomes[0].seconds,
        }
    folder.finish(record)
    return record, outcomes


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
        index = int(metadata["image"])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise CspdError(
            f"{path}: its settings are not valid: {str(error).splitlines()[0]}"
        ) from None
    if not 0 <= index < config.num_images:
        raise CspdError(f"{path}: image {index}, expected 0..{config.num_images - 1}")
    pipeline = Pipeline(bundle, config.backend, device, threads)
    images, _ = next(pipeline.generate(config, [index]))
    with Image.open(path) as stored:
        expected = np.asarray(stored)
    got = images[0].pixels[..., 0] if images[0].pixels.shape[-1] == 1 else images[0].pixels
    return images[0], _digest(got) == _digest(expected)


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
