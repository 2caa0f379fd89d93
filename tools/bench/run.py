"""Measure the points of a plan: batch by batch, interleaved, every result written at once."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.sessions.session import CallStats, Session, TorchSession
from cspd.export.graphs.denoiser_loop import DenoiserLoopGraph
from cspd.export.torch_session import decoder_module, graph_module
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.stats import Statistics
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions
from cspd.runtime.store.outputs import environment, tool_version
from cspd.tools.bench.plan import COMPILED, TRIES, Point, plan_hash, titles
from cspd.tools.bench.replay import AcceptancePattern, ReplayPipeline
from cspd.tools.bench.results import SCHEMA
from cspd.tools.probe import unchanged, verdicts, wrapping

JOURNAL = "bench.jsonl"
PIXELS = "pixels"  # kept images of scored points
PROBES = {"map": "where tokens are accepted", "tries": "at most {} draws of the residual"}
WARM_UP = -1  # repeat number of a batch that is run before anything counts
Line = dict[str, Any]


class Journal:
    """Append-only JSON lines: the first describes the run, each other is one finished measurement.

    A run that was interrupted resumes behind its last complete line.
    """

    def __init__(self, folder: Path, header: Line) -> None:
        self.path = folder / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        self.lines = read_lines(self.path) if self.path.exists() else []
        if not self.lines:
            self.path.write_text("")
            self.append(header)
        elif any(
            self.lines[0].get(key) != header[key]
            for key in ("bundle", "plan", "threads", "replayed")
        ):
            raise CspdError(
                f"{self.path}: holds results of another bundle, plan, pattern or number "
                "of threads; choose another --out"
            )
        else:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            self.path.write_text(text)  # without a line that was cut off

    def append(self, line: Line) -> None:
        """Add one line, on disk when the call returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def has(self, point: str, repeat: int) -> bool:
        """Whether this measurement is there already."""
        return any(line.get("point") == point and line.get("repeat") == repeat
                   for line in self.lines)  # fmt: skip


def read_lines(path: Path) -> list[Line]:
    """The complete lines of a journal; a last line that was cut off is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def make_header(
    bundle: Bundle, points: list[Point], threads: int, pattern: AcceptancePattern | None = None
) -> Line:
    """What is measured, and on what."""
    return {
        "kind": "bench",
        "schema": SCHEMA,
        "tool": tool_version(),
        "bundle": bundle.sha256,
        "synthetic": bundle.manifest.synthetic,
        "plan": plan_hash(points),
        "threads": threads,
        "replayed": pattern.model_dump(mode="json") if pattern else None,
        "host": environment(),
        "models": {role: model.preset for role, model in bundle.manifest.models.items()},
        "num_tokens": bundle.manifest.geometry.num_tokens,
        "points": [point.model_dump(mode="json") for point in points],
    }


@dataclass
class Bench:
    """Runs points on pipelines that stay open; `say` gets a line per finished measurement."""

    bundle: Bundle
    journal: Journal
    device: str = "cpu"
    threads: int = 0
    say: Callable[[str], None] = print
    pattern: AcceptancePattern | None = None
    pipelines: dict[str, Pipeline] = field(default_factory=dict)
    warmed: set[str] = field(default_factory=set)

    def run(self, points: list[Point]) -> None:
        """Measure what the journal does not hold yet: start-up, warm-up, probes, batches."""
        self._starts(points)
        jobs, names = list(self._jobs(points)), titles(points)
        for number, (point, repeat) in enumerate(jobs, 1):
            if repeat == 0:
                self._probes(points)
            if not self.journal.has(point.id, repeat) and not self._gave_up(point):
                if repeat != WARM_UP and point.warm_key not in self.warmed:
                    self._attempt(point, WARM_UP)  # a resumed run is cold again
                line = self._attempt(point, repeat)
                self.journal.append(line)
                self.say(f"[{number}/{len(jobs)}] {describe(line, names[point.id])}")

    def _jobs(self, points: list[Point]) -> Iterator[tuple[Point, int]]:
        """Warm-ups first, then the points interleaved: drift of the machine hits all alike."""
        warm: dict[str, Point] = {}
        for point in points:
            warm.setdefault(point.warm_key, point)
        for point in warm.values():
            yield point, WARM_UP
        for repeat in range(max(point.repeats for point in points)):
            turn = [point for point in points if repeat < point.repeats]
            shift = repeat % len(turn)
            for point in turn[shift:] + turn[:shift]:
                yield point, repeat

    def _gave_up(self, point: Point) -> bool:
        """Whether this point failed before, or its compiler did."""
        skips = [line for line in self.journal.lines if line["kind"] == "skip"]
        return any(
            line["point"] == point.id or point.backend == line["backend"] == COMPILED
            for line in skips
        )

    def _attempt(self, point: Point, repeat: int) -> Line:
        try:
            return self.measure(point, repeat)
        except CspdError as error:
            reason = str(error)
        except Exception as error:  # a compiler that is missing or fails raises all sorts
            if point.backend != COMPILED:
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return {"kind": "skip", "backend": point.backend, "point": point.id, "repeat": repeat,
                "reason": reason}  # fmt: skip

    def measure(self, point: Point, repeat: int) -> Line:
        """One batch of `point`: wall-clock and session time, calls, memory, verdicts."""
        pipeline = self.pipeline(point.backend)
        config, _ = pipeline.resolve(point.config)  # measures costs, where a choice needs them
        pipeline.open(config)
        first = max(repeat, 0) * config.batch_size
        before = {name: (s.calls, s.seconds) for name, s in pipeline.sessions.calls.items()}
        reset_peak_memory(self.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        batches = list(pipeline.generate(config, range(first, first + config.batch_size)))
        seconds = time.perf_counter() - start
        cpu = time.process_time() - start_cpu if self.device == "cpu" else None
        self.warmed.add(point.warm_key)
        images, statistics = batches[0]
        if point.quality and repeat >= 0:
            self._keep(point, repeat, np.stack([image.pixels for image in images]))
        calls = _since(before, pipeline.sessions.calls)
        return {
            "kind": "batch", "point": point.id, "repeat": repeat, "images": config.batch_size,
            "seconds": seconds, "cpu_seconds": cpu, "graphs": calls,
            "host_seconds": self._host(seconds, calls), "peak_memory_mb": peak_memory(self.device),
            "load": os.getloadavg()[0], **_counts(statistics),
        }  # fmt: skip

    def _host(self, seconds: float, calls: dict[str, dict[str, float]]) -> float | None:
        """Time outside the sessions; unknown on a GPU, where a call only issues work."""
        if self.device != "cpu":
            return None
        return seconds - sum(stats["seconds"] for stats in calls.values())

    def _keep(self, point: Point, repeat: int, pixels: np.ndarray) -> None:
        folder = self.journal.path.parent / PIXELS / point.id
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".part.npy"
        np.save(temporary, pixels)
        os.replace(temporary, folder / f"{repeat:05d}.npy")

    def pipeline(self, backend: str) -> Pipeline:
        """The pipeline of a backend, opened when first needed."""
        if backend not in self.pipelines:
            name, wrap = ("torch", self._compiled) if backend == COMPILED else (backend, unchanged)
            sessions = Sessions(self.bundle, name, self.device, self.threads, opener=wrapping(wrap))
            self.pipelines[backend] = ReplayPipeline(
                sessions, working=self._working, pattern=self.pattern
            )
        return self.pipelines[backend]

    @contextlib.contextmanager
    def _working(self, what: str) -> Iterator[None]:
        self.say(what)
        yield

    def _compiled(self, label: str, session: Session) -> Session:
        """The PyTorch session of `label` with its module compiled for dynamic shapes."""
        if label == "decoder":
            module = decoder_module(self.bundle)
        else:
            module = graph_module(self.bundle, label)
        # Unrolled, a whole denoising loop would take hours to compile.
        inner = module.reference if isinstance(module, DenoiserLoopGraph) else module
        return TorchSession(session.spec, _Compiled(module, inner), session.device)

    def _starts(self, points: list[Point]) -> None:
        """Time to open all sessions, hashes included: first, and again with warm file caches."""
        for backend in sorted({p.backend for p in points} - {"torch", COMPILED}):
            for repeat, name in enumerate(("first", "again")):
                key = f"start {backend}"
                if not self.journal.has(key, repeat):
                    fresh = Bundle(self.bundle.folder, self.bundle.manifest)
                    pipeline = Pipeline(Sessions(fresh, backend, self.device, self.threads))
                    start = time.perf_counter()
                    pipeline.open(next(p.config for p in points if p.backend == backend))
                    seconds = time.perf_counter() - start
                    line = {"kind": "start", "point": key, "repeat": repeat, "which": name}
                    self.journal.append({**line, "backend": backend, "seconds": seconds})

    def _probes(self, points: list[Point]) -> None:
        """Figures 15 and 16: tries of the residual, and where on the image tokens are accepted."""
        point = next((p for p in points if "figure 11" in p.serves), None)
        if point is None or self.pattern is not None:
            return
        largest = max(p.config.batch_size for p in points)
        usual = point.config.model_copy(update={"num_images": largest})
        self._probe("map", 0, point, usual)
        size = {"num_images": point.config.batch_size, "on_reject": "residual"}
        for tries in TRIES:
            self._probe("tries", tries, point, point.config.model_copy(update=size))

    def _probe(self, name: str, tries: int, point: Point, config: RunConfig) -> None:
        """One batch of `config`, round by round; `tries`, unless 0, limits the residual's draws."""
        if not self.journal.has(name, tries):
            line = probe(self.pipeline(point.backend), config, tries or None)
            self.journal.append({"kind": "probe", "point": name, "repeat": tries, **line})
            self.say(f"probe: {PROBES[name].format(tries)}")


class _Compiled(torch.nn.Module):
    """`module` with its part `inner`, itself or a submodule, compiled for dynamic shapes."""

    def __init__(self, module: torch.nn.Module, inner: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        # In place: a graph module is made again for every session, unlike the network behind it.
        self.run = torch.compile(module, dynamic=True) if inner is module else module
        if inner is not module:
            inner.compile(dynamic=True)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """What the module returns."""
        return self.run(*tensors)


def probe(pipeline: Pipeline, config: RunConfig, tries: int | None) -> Line:
    """One batch of `cspd` with at most `tries` residual draws: verdicts, counts per position."""
    length = pipeline.bundle.manifest.geometry.num_tokens
    judged, accepted = torch.zeros(length), torch.zeros(length)
    statistics = Statistics()
    for done, verdict in verdicts(pipeline, config, tries):
        positions = verdict.window.span.positions.long().cpu()
        judged += positions[verdict.kept.cpu()].bincount(minlength=length)
        accepted += positions[verdict.accepted.cpu()].bincount(minlength=length)
        statistics = done.statistics
    return {"tries": tries, "accepted_at": accepted.tolist(), "judged_at": judged.tolist(),
            **_counts(statistics)}  # fmt: skip


def describe(line: Line, name: str) -> str:
    """A measurement of the point called `name` in one line."""
    if line["kind"] == "skip":
        return f"{name}: skipped, {line['reason']}"
    warm = " (warm-up)" if line["repeat"] == WARM_UP else ""
    return f"{name}: {line['seconds'] / line['images']:.3f} s per image{warm}"


def _counts(statistics: Statistics) -> Line:
    return {
        "verdicts": asdict(statistics.verdicts),
        "rounds": {str(known): asdict(v) for known, v in sorted(statistics.rounds.items())},
        "target_rounds": statistics.target_rounds,
        "target_calls": statistics.target_calls,
        "draft_calls": statistics.draft_calls,
        "distance_sum": statistics.distance_sum,
    }


def _since(
    before: dict[str, tuple[int, float]], now: dict[str, CallStats]
) -> dict[str, dict[str, float]]:
    """Calls and seconds of every graph that was called since `before`."""
    found = {}
    for name, stats in now.items():
        calls, seconds = before.get(name, (0, 0.0))
        if stats.calls > calls:
            found[name] = {"calls": stats.calls - calls, "seconds": stats.seconds - seconds}
    return found


def reset_peak_memory(device: str) -> None:
    """Let `peak_memory` start from here, as far as the system allows it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is that of the process so far


def peak_memory(device: str) -> float:
    """Peak memory in 1e6 bytes since the reset: of PyTorch on a GPU, of the process otherwise."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        for row in status.read_text().splitlines():
            if row.startswith("VmHWM:"):
                return float(row.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
