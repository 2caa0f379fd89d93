"""The head of one autoregressive step, lossless against plain: `python -m cspd.tools.head_bench`.

The shipped pair runs with its own weights. `--preset mar-b` or `mar-h` runs a head of that size
with random weights and replays the acceptance, by denoising step, that the shipped pair has:
SYNTHETIC, timing only. All ways are measured in turn in one run; the median of the repeats counts.
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
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cspd.engines.bundle import open_bundle
from cspd.engines.schedule import Schedule, make_schedule
from cspd.engines.session import Session
from cspd.export.presets import PRESETS
from cspd.runtime.cli import shipped_bundle
from cspd.runtime.config import RunConfig, make_config
from cspd.runtime.coupling import Gaussian
from cspd.runtime.heads import DEFAULT_WINDOW
from cspd.runtime.hoisted import HoistedHead
from cspd.runtime.lossless import Round, SpeculativeHead
from cspd.runtime.member import Head, LoopHead, Rows, StepHead
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.rounds import ReferenceRound, Window
from cspd.runtime.speculation import SpeculationOptions, SpeculativeSample
from cspd.runtime.tuning import Examples
from cspd.tools.synthetic_head import SyntheticHead

STEPS = 100
RECORDING_TOKENS = 48
REFERENCE = "PyTorch, step by step"


class ReplayRound(ReferenceRound):
    """Accepts with given probabilities by step; everything else is computed as usual."""

    def __init__(self, denoiser: Session, acceptance: Tensor) -> None:
        super().__init__(denoiser)
        self.log_rate = acceptance.log()

    def test(self, window: Window, target: Gaussian, t: dict[str, Tensor]) -> Tensor:
        """Which drafts pass, bool [N, L]."""
        super().test(window, target, t)
        return t["log_accept"] < self.log_rate[window.steps.long()]

    def repair(
        self, target: Gaussian, drafted: Gaussian, drawn: Tensor, t: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The target's draw: candidates of random weights would be refused for ever."""
        _, index = super().repair(target, drafted, drawn, t)
        return drawn, torch.zeros_like(index)


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
    examples = Examples.of(pipeline, "target", config)
    geometry = pipeline.bundle.manifest.geometry
    ways = {"plain, one loop graph": pipeline.plain_head("target")}
    session = pipeline.session("target/speculative_round")
    for window in windows:
        options = SpeculationOptions(window, max_rows=session.spec.axes["rows"].max)
        ways[f"lossless, window {window}"] = SpeculativeHead(session, options, geometry.token_dim)
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

    def speculative(window: int) -> Callable[[Session], Head]:
        def head(denoiser: Session) -> Head:
            replay: Round = ReplayRound(denoiser, rates)
            return SpeculativeHead(replay, SpeculationOptions(window), config.token_dim)

        return head

    with tempfile.TemporaryDirectory() as folder:
        head = SyntheticHead(preset, Path(folder), threads)
        denoiser, hoisted = head.onnx("denoiser"), head.onnx("denoiser_hoisted")
        modulate = head.onnx("head_modulation")
        ways: dict[str, Head] = {
            REFERENCE: StepHead(head.torch("denoiser")),
            "plain, one loop graph": LoopHead(head.onnx("denoiser_loop")),
            "plain, hoisted": HoistedHead(modulate, hoisted, StepHead),
        }
        for window in windows:
            ways[f"lossless, window {window}"] = speculative(window)(denoiser)
            ways[f"lossless, window {window}, hoisted"] = HoistedHead(
                modulate, hoisted, speculative(window)
            )
        yield Setup(schedule, rows, ways)


def measure(
    setup: Setup, tokens: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Every way in turn, `repeats` times after a warm-up, by the seconds of `clock`."""
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
    """Times, and ratios to the best plain way of ONNX Runtime and to PyTorch."""
    plain = min(t.ms for name, t in found.items() if name.startswith("plain"))
    slowest = found[REFERENCE].ms if REFERENCE in found else None
    result = Table(
        "way", "head calls", "rows per token", "ms", "against best plain", "against PyTorch",
        title=title, title_justify="left",
    )  # fmt: skip
    for name, timing in found.items():
        counts = (f"{value:.1f}" if value else "-" for value in (timing.calls, timing.rows))
        ratio = "-" if slowest is None else f"{slowest / timing.ms:.2f}x"
        result.add_row(name, *counts, f"{timing.ms:.1f}", f"{plain / timing.ms:.2f}x", ratio)
    return result


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
    if cpu_time:
        torch.set_num_threads(1)
        threads, clock, unit = 1, time.process_time, "CPU time of one thread"
    bundle = open_bundle(shipped_bundle())
    pipeline = Pipeline(bundle, threads=threads)
    values = {**bundle.manifest.defaults, "labels": (0,), "num_images": 1, "method": "target"}
    config = make_config(**values)
    sizes = [int(part) for part in windows.split(",")]
    console = Console()
    if preset is None:
        setup = pair_setup(pipeline, config, tuple(sizes))
        for count in (int(part) for part in tokens.split(",")):
            found = measure(setup, count, repeats, clock)
            title = f"shipped pair, {count} tokens with guidance, {unit}"
            console.print(table(title, found))
        return
    acceptance = recorded_acceptance(pipeline, config)
    schedule = make_schedule(bundle.manifest.schedule, STEPS)
    with synthetic_setup(preset, acceptance, tuple(sizes), threads, schedule) as setup:
        for count in (int(part) for part in tokens.split(",")):
            title = f"SYNTHETIC {preset} head, replayed acceptance, {count} tokens, {unit}"
            console.print(table(title, measure(setup, count, repeats, clock)))


if __name__ == "__main__":
    main()
