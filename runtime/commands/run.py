"""Runs of the command line: a folder of images, and the target to compare."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cspd.engines.backends import open_session
from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.words import counted
from cspd.runtime.config import RunConfig, check_config
from cspd.runtime.decode.stats import Tally
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.progress import RunProgress, working
from cspd.runtime.scale.local_ray import import_ray
from cspd.runtime.scale.pool import Cluster, Machine, connected, pool
from cspd.runtime.scale.stopping import StopWish
from cspd.runtime.sessions import Opener, Sessions
from cspd.runtime.store.batches import FinishedBatch, encode, timed_batches
from cspd.runtime.store.folder import RunFolder
from cspd.runtime.store.formats import Layout
from cspd.runtime.store.outputs import figures, run_record, tally_of
from cspd.runtime.store.resume import open_run, recorded


@dataclass(frozen=True)
class Outcome:
    """What one run measured."""

    config: RunConfig
    tally: Tally


@dataclass(frozen=True)
class Job:
    """How a run is done; nothing in it changes an image."""

    machine: Machine = field(default_factory=Machine)
    layout: Layout = field(default_factory=Layout)
    # Ray instead of this process.
    cluster: Cluster | None = None
    overwrite: bool = False
    # Also run the target alone, on the same sessions and noise, without saving it.
    baseline: bool = False
    quiet: bool = False
    # Opens the graphs in this process.
    opener: Opener = open_session


def generate(
    bundle: Bundle, config: RunConfig, out: Path, job: Job
) -> tuple[dict[str, Any], list[Outcome]]:
    """Generate the images that `out` lacks; returns `run.json` and the measured outcomes.

    A run that is finished already returns what its folder says and makes nothing; CspdError if that
    is no baseline, where one is asked for. A run that was begun keeps the choices it began with.
    Raises Interrupted when a signal asked to stop; images in flight were finished and written.
    """
    check_config(config, bundle.manifest)
    job.layout.check()
    machine = job.machine
    sessions = Sessions(bundle, config.backend, machine.device, machine.threads, job.opener)
    pipeline = Pipeline(sessions, working=partial(working, quiet=job.quiet))
    old = None if job.overwrite else recorded(out, config, bundle, job.layout)
    if old is None:
        config, chosen = pipeline.resolve(config)
        choices = {str(role): explained.reason for role, explained in chosen.items()}
    else:
        config, choices = old
    for role, reason in choices.items():
        Console(stderr=True, quiet=job.quiet).print(f"{role} head: {reason}", markup=False)
    if job.cluster is not None:
        return _generate_on_ray(bundle, config, out, job, job.cluster, choices)
    if old is None:
        # Before the folder is made: what cannot run leaves nothing behind.
        pipeline.open(config)
    opened = open_run(out, config, bundle, job.layout, choices=choices, overwrite=job.overwrite)
    with opened as folder, StopWish() as stop:
        if folder.record is not None:
            if job.baseline:
                _check_baseline(folder, folder.record)
            return folder.record, _finished(folder, folder.record, job.quiet)
        pipeline.open(config)
        if job.baseline and folder.missing:
            warm_up(pipeline, config)
        progress = _progress(folder, job.quiet)
        session = _write(folder, _here(pipeline, folder, stop, progress), stop, progress)
        outcomes = [Outcome(config, folder.tally)]
        record = _record(folder, session)
        record["cuda_graphs"] = {
            role: asdict(stats) for role, stats in pipeline.heads.captures.items()
        }
        record["notes"] = list(dict.fromkeys(pipeline.sessions.notes))
        if job.baseline and config.method != "target":
            plain, _ = pipeline.resolve(
                config.model_copy(
                    update={"method": "target", "head": None, "heads": (), "relax": None}
                )
            )
            outcomes.append(measure(pipeline, plain, stop, job.quiet, folder.again))
            record["baseline"] = _compare(*outcomes)
        record = folder.finish(record)
    return record, outcomes


def _generate_on_ray(
    bundle: Bundle,
    config: RunConfig,
    out: Path,
    job: Job,
    cluster: Cluster,
    choices: dict[str, str],
) -> tuple[dict[str, Any], list[Outcome]]:
    """`generate` with workers that compute; this process writes."""
    import_ray()
    opened = open_run(out, config, bundle, job.layout, choices=choices, overwrite=job.overwrite)
    with opened as folder:
        if folder.record is not None:
            return folder.record, _finished(folder, folder.record, job.quiet)
        # The signals are ours only once Ray has set its own handlers.
        with (
            connected(job.machine, cluster) as ray,
            pool(ray, bundle, config, job.machine, cluster, folder.missing) as workers,
            StopWish() as stop,
        ):
            count = len(workers.workers)
            progress = _progress(folder, job.quiet, f", {counted(count, 'worker')}")
            workers.say = progress.say
            session = _write(folder, workers.batches(stop), stop, progress)
        record = folder.finish(_record(folder, session | {"workers": count}))
    return record, [Outcome(config, folder.tally)]


def _check_baseline(folder: RunFolder, record: dict[str, Any]) -> None:
    """Raise CspdError if a finished run was not compared with the target alone."""
    if folder.config.method != "target" and "baseline" not in record:
        raise CspdError(
            f"{folder.folder}: the run was finished without --baseline, which compares times while "
            "images are made; choose another --out, or add --overwrite to make them again"
        )


def _finished(folder: RunFolder, record: dict[str, Any], quiet: bool) -> list[Outcome]:
    """What the record of a finished run says was measured."""
    count = folder.config.num_images
    intact = f"{folder.folder}: the run is finished, its {count} images are intact"
    Console(stderr=True, quiet=quiet, soft_wrap=True).print(intact, markup=False, highlight=False)
    baseline = record.get("baseline")
    parts = {"": record, "target": baseline if isinstance(baseline, dict) else {}}
    tallies = {method: tally_of(part) for method, part in parts.items()}
    return [
        Outcome(folder.config.model_copy(update={"method": method} if method else {}), tally)
        for method, tally in tallies.items()
        if tally is not None
    ]


def _here(
    pipeline: Pipeline, folder: RunFolder, stop: StopWish, progress: RunProgress
) -> Iterator[FinishedBatch]:
    """The images that `folder` lacks, made in this process; ends after a signal."""
    config, missing = folder.config, folder.missing
    progress.begin_batch(min(config.batch_size, len(missing)))
    for images, tally in timed_batches(pipeline, config, missing, progress.on_step):
        files = [encode(config, folder.bundle, image) for image in images]
        yield FinishedBatch(files, tally, os.getpid())
        if stop.number is not None:
            return
        progress.begin_batch(config.batch_size)


def _write(
    folder: RunFolder,
    batches: Iterator[FinishedBatch],
    stop: StopWish,
    progress: RunProgress,
) -> dict[str, Any]:
    """Write every batch as it comes; returns what this session did. Raises Interrupted."""
    made, begin = 0, time.perf_counter()
    with progress:
        for batch in batches:
            folder.add(batch)
            made += len(batch.files)
            progress.advance(len(batch.files))
    stop.check(folder.state, folder.again)
    return {"images": made, "wall_seconds": time.perf_counter() - begin, "workers": 1}


def _progress(folder: RunFolder, quiet: bool, note: str = "") -> RunProgress:
    total = folder.config.num_images
    done = total - len(folder.missing)
    return RunProgress(folder.config.method + note, total, quiet, done=done)


def _record(folder: RunFolder, session: dict[str, Any]) -> dict[str, Any]:
    """What goes into run.json; `session` is the part of the work that ended it."""
    record = run_record(folder.config, folder.bundle, folder.tally)
    record |= {"layout": folder.identity["layout"], "session": session}
    return record | ({"choices": folder.choices} if folder.choices else {})


def warm_up(pipeline: Pipeline, config: RunConfig) -> None:
    """One batch that is thrown away: the first one allocates, compiles and records."""
    next(pipeline.generate(config, list(range(min(config.batch_size, config.num_images)))))


def measure(
    pipeline: Pipeline,
    config: RunConfig,
    stop: StopWish,
    quiet: bool,
    again: str = "the same command resumes",
) -> Outcome:
    """Generate every image of `config` without keeping any."""
    pipeline.open(config)
    warm_up(pipeline, config)
    total = Tally()
    with RunProgress(config.method, config.num_images, quiet) as progress:
        progress.begin_batch(min(config.batch_size, config.num_images))
        everything = list(range(config.num_images))
        for images, tally in timed_batches(pipeline, config, everything, progress.on_step):
            total.add(tally)
            progress.advance(len(images))
            progress.begin_batch(config.batch_size)
            stop.check("measuring the target alone", again)
    return Outcome(config, total)


def _compare(outcome: Outcome, target: Outcome) -> dict[str, Any]:
    """The target alone against the method, per image."""
    ours, plain = outcome.tally, target.tally
    ratio = plain.seconds / plain.images / (ours.seconds / ours.images) if ours.images else None
    return {"method": "target", **figures(plain), "speed_ratio": ratio}
