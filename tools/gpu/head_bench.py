"""One autoregressive step of the head, lossless against plain: `cspd.tools.gpu.head_bench`.

The shipped pair runs with its own weights. `--preset mar-b` or `mar-h` runs a head of that size
with random weights and replays the acceptance, by denoising step, that the shipped pair has:
SYNTHETIC, timing only. Ratios are times of a plain way over those of the row; all ways are
measured interleaved in one run; the median of the repeats counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch

from cspd.engines.bundle import open_bundle
from cspd.engines.console.table import Table
from cspd.engines.console.terminal import print_table
from cspd.engines.schedule import Schedule, make_schedule
from cspd.engines.sessions.ort import ort_session
from cspd.export.mar.presets import PRESETS
from cspd.runtime.commands.cli import shipped_bundle
from cspd.runtime.config import RunConfig, make_config
from cspd.runtime.costs.measure import Examples
from cspd.runtime.costs.sizes import DEFAULT_WINDOW
from cspd.runtime.heads.base import Head, Rows
from cspd.runtime.heads.plain import LoopHead, StepHead
from cspd.runtime.heads.speculation import SpeculationOptions, SpeculativeSample
from cspd.runtime.heads.speculative_loop import SpeculativeLoopHead
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.tools.bench.replay_numbers import ReplayNumbers
from cspd.tools.gpu.synthetic_head import SyntheticHead

STEPS = 100
RECORDING_TOKENS = 48
REFERENCE, STEPS_OF_CALLS = "PyTorch, step by step", "plain, one call a step"
LOOP = "plain, one loop graph"
BASES = {STEPS_OF_CALLS: "of a call a step", LOOP: "of the loop graph", REFERENCE: "of PyTorch"}


@dataclass(frozen=True)
class Setup:
    """What every way is run on."""

    schedule: Schedule
    rows: Callable[[int], Rows]
    ways: dict[str, Head]


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one way; mean head calls and rows a token, if it speculated."""

    ms: float
    calls: float = 0.0
    rows: float = 0.0


def pair_setup(pipeline: Pipeline, config: RunConfig, windows: tuple[int, ...]) -> Setup:
    """The target head of the shipped pair on conditions of its own images."""
    examples = Examples.of(pipeline.heads, "target", config)
    label = "target/denoiser"
    # On one thread: cutting so small a call up for the cores would cost more than it saves.
    denoiser = ort_session(
        str(pipeline.bundle.graph_file(label)), pipeline.bundle.graph(label).spec, threads=1
    )
    ways: dict[str, Head] = {
        STEPS_OF_CALLS: StepHead(denoiser),
        LOOP: pipeline.heads.plain("target"),
    }
    for window in windows:
        options = SpeculationOptions(window, max_rows=pipeline.heads.most_rows("target"))
        ways[f"lossless, window {window}"] = pipeline.heads.speculative("target", options)
    schedule = make_schedule(pipeline.bundle.manifest.schedule, STEPS)
    return Setup(schedule, examples, ways)


def recorded_acceptance(pipeline: Pipeline, config: RunConfig) -> np.ndarray:
    """Share of accepted drafts of the shipped pair's target, by step [S]."""
    setup = pair_setup(pipeline, config, (16,))
    sampled = setup.ways["lossless, window 16"](
        setup.rows(RECORDING_TOKENS), setup.schedule, Noise(0), Purpose.DENOISE
    )
    assert isinstance(sampled, SpeculativeSample)
    return (sampled.stats.accepted + 0.5) / (sampled.stats.tested + 1)


@contextmanager
def synthetic_setup(
    preset: str, acceptance: np.ndarray, windows: tuple[int, ...], threads: int, schedule: Schedule
) -> Iterator[Setup]:
    """A head of `preset` with random weights and replayed `acceptance`."""
    config, rates = PRESETS[preset], torch.from_numpy(acceptance).float()

    def rows(count: int) -> Rows:
        generator = torch.Generator().manual_seed(1)
        conditions = torch.randn(2, count, config.embed_dim, generator=generator)
        one = torch.ones(count)
        return Rows(conditions, 2 * one, one, torch.arange(count), torch.arange(count))

    def replay(noise: Noise, purpose: Purpose) -> ReplayNumbers:
        return ReplayNumbers(noise, purpose, rates)

    with tempfile.TemporaryDirectory() as folder:
        head = SyntheticHead(preset, Path(folder), threads)
        ways: dict[str, Head] = {
            REFERENCE: StepHead(head.torch("denoiser")),
            STEPS_OF_CALLS: StepHead(head.onnx("denoiser")),
            LOOP: LoopHead(head.onnx("denoiser_loop")),
        }
        speculative = head.onnx("speculative_loop")
        for window in windows:
            ways[f"lossless, window {window}"] = SpeculativeLoopHead(
                speculative, SpeculationOptions(window), numbers=replay
            )
        yield Setup(schedule, rows, ways)


def measure(
    setup: Setup, tokens: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Every way, interleaved, `repeats` times after a warm-up, by the seconds of `clock`."""
    found: dict[str, list[Timing]] = {name: [] for name in setup.ways}
    for repeat in range(repeats + 1):
        for name, head in setup.ways.items():
            rows, start = setup.rows(tokens), clock()
            out = head(rows, setup.schedule, Noise(repeat), Purpose.DENOISE)
            timing = Timing(1000 * (clock() - start))
            if isinstance(out, SpeculativeSample):
                counts = {"calls": out.stats.calls, "rows": out.stats.rows / tokens}
                timing = replace(timing, **counts)
            if repeat:
                found[name].append(timing)
    return {name: _summary(timings) for name, timings in found.items()}


def _summary(timings: list[Timing]) -> Timing:
    """Median time, mean counts. Not the least time: that would be the luckiest noise."""
    calls, rows = (
        float(np.mean([getattr(t, name) for t in timings])) for name in ("calls", "rows")
    )
    return Timing(float(np.median([t.ms for t in timings])), calls, rows)


def table(title: str, found: dict[str, Timing]) -> Table:
    """Times, and ratios to each plain way."""
    bases = {name: label for name, label in BASES.items() if name in found}
    rows = []
    for name, timing in found.items():
        counts = (f"{value:.1f}" if value else "-" for value in (timing.calls, timing.rows))
        ratios = (f"{found[base].ms / timing.ms:.2f}x" for base in bases)
        rows.append([name, *counts, f"{timing.ms:.1f}", *ratios])
    return Table(title, ("way", "head calls", "rows per token", "ms", *bases.values()), rows)


@click.command()
@click.option("--preset", type=click.Choice(["mar-b", "mar-l", "mar-h"]), help="Synthetic head.")
@click.option("--tokens", default="1,4", show_default=True, help="Tokens of the step.")
@click.option("--windows", default=f"{DEFAULT_WINDOW},16", show_default=True)
@click.option("--threads", default=0, show_default="all cores")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--cpu-time",
    is_flag=True,
    help="CPU time on one thread, for a machine that has other work; else wall-clock time.",
)
def main(
    preset: str | None, tokens: str, windows: str, threads: int, repeats: int, cpu_time: bool
) -> None:
    """Measure the head of one autoregressive step with guidance and 100 denoising steps."""
    clock, unit = time.perf_counter, "wall-clock"
    if preset is None:
        torch.set_num_threads(1)  # as a run does, whose host has only small work
    if cpu_time:
        torch.set_num_threads(1)
        threads, clock, unit = 1, time.process_time, "CPU time of one thread"
    bundle = open_bundle(shipped_bundle())
    pipeline = Pipeline(Sessions(bundle, threads=threads))
    values = {**bundle.manifest.defaults, "labels": (0,), "num_images": 1, "method": "target"}
    config = make_config(**values)
    sizes = [int(part) for part in windows.split(",")]
    if preset is None:
        setup = pair_setup(pipeline, config, tuple(sizes))
        for count in (int(part) for part in tokens.split(",")):
            found = measure(setup, count, repeats, clock)
            title = f"shipped pair, {count} tokens with guidance, {unit}"
            print_table(table(title, found))
        return
    acceptance = recorded_acceptance(pipeline, config)
    schedule = make_schedule(bundle.manifest.schedule, STEPS)
    with synthetic_setup(preset, acceptance, tuple(sizes), threads, schedule) as setup:
        for count in (int(part) for part in tokens.split(",")):
            title = f"SYNTHETIC {preset} head, replayed acceptance, {count} tokens, {unit}"
            print_table(table(title, measure(setup, count, repeats, clock)))


if __name__ == "__main__":
    main()
