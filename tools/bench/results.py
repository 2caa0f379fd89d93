"""The journal of a benchmark as summaries per setting."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.tools.bench.plan import Point
from cspd.tools.judge import scores
from cspd.tools.judge.bootstrap import interval, replicates

SCHEMA = 2  # 2: target calls and rounds apart, `replaced_by_target` beside `fallback`
Line = dict[str, Any]
LEAST_BATCHES = 5  # for an interval of a speed


@dataclass(frozen=True)
class Summary:
    """What was measured at one point, over its batches without the warm-up.

    `seconds`: median wall-clock time per image, `low` and `high` its quartiles; `cpu_seconds`:
    median processor time per image of all threads, on a CPU, which other programs hardly change;
    `host`: the share of the time outside the sessions; `graphs`: seconds per image by graph; calls
    are per batch; `replaced`: judged tokens that the target's own sample replaced.
    """

    point: Point
    batches: int
    seconds: float
    low: float
    high: float
    cpu_seconds: float | None
    host: float | None
    graphs: dict[str, float]
    calls: dict[str, float]
    target_rounds: float
    target_calls: float
    draft_calls: float
    peak_memory_mb: float
    acceptance: float | None
    replaced: float | None
    distance: float | None
    score: dict[str, float]
    # Of every score that has one: both ends of its 95 % interval, and its redrawn values.
    interval: dict[str, list[float]]
    redrawn: dict[str, list[float]]

    def scored(self, name: str) -> str:
        """A score with half its interval, "-" if it was not measured."""
        if name not in self.score:
            return "-"
        return scores.text(name, self.score[name], self.interval.get(name))

    def difference(self, other: Summary, name: str) -> tuple[float, list[float]] | None:
        """A score less that of `other`, with its 95 % interval; None unless both have one at one n.

        All settings of a benchmark share a seed and so their noise: see `bootstrap`.
        """
        both = name in self.redrawn and name in other.redrawn
        if not both or self.score["n"] != other.score["n"]:
            return None
        value = self.score[name] - other.score[name]
        ours, theirs = (torch.tensor(item.redrawn[name]) for item in (self, other))
        return value, interval(value, ours - theirs)


@dataclass
class Results:
    """The journal of one benchmark, indexed by point."""

    lines: list[Line]
    points: dict[str, Point] = field(init=False)
    _by_point: dict[str, list[Line]] = field(init=False)

    def __post_init__(self) -> None:
        if not self.lines or self.lines[0].get("kind") != "bench":
            raise CspdError("not the journal of a benchmark: its first line does not say so")
        if self.header["schema"] != SCHEMA:
            raise CspdError(
                f"the journal of a benchmark has schema {self.header['schema']}, expected "
                f"{SCHEMA}; measure again with cspd-run bench"
            )
        found = [Point.model_validate(point) for point in self.header["points"]]
        self.points = {point.id: point for point in found}
        self._by_point = {}
        for line in self.lines[1:]:
            self._by_point.setdefault(line["point"], []).append(line)

    @property
    def header(self) -> Line:
        """The first line: bundle, host, points."""
        return self.lines[0]

    def of(self, point: str, kind: str) -> list[Line]:
        """Lines of one kind about a point."""
        return [line for line in self._by_point.get(point, []) if line["kind"] == kind]

    def batches(self, point: str) -> list[Line]:
        """Measured batches of a point, without its warm-up."""
        return [line for line in self.of(point, "batch") if line["repeat"] >= 0]

    def serving(self, tag: str, **settings: Any) -> list[Summary]:
        """Summaries of the measured points behind a table or figure, with these settings."""
        found = []
        for point in self.points.values():
            values = point.config.model_dump()
            wanted = all(values[name] == value for name, value in settings.items())
            if tag in point.serves and wanted and self.batches(point.id):
                found.append(self.summary(point))
        return sorted(found, key=_order)

    def summary(self, point: Point) -> Summary:
        """Medians over the batches of a point."""
        lines = self.batches(point.id)
        times = sorted(line["seconds"] / line["images"] for line in lines)
        quartiles = (
            statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        )
        hosts = [line["host_seconds"] / line["seconds"] for line in lines
                 if line["host_seconds"] is not None]  # fmt: skip
        scores = self.of(point.id, "score")
        judged = _total(lines, "proposed") - _total(lines, "discarded")
        own = _total(lines, "replaced_by_target") + _total(lines, "fallback")
        return Summary(
            point=point,
            batches=len(lines),
            seconds=statistics.median(times),
            low=quartiles[0],
            high=quartiles[2],
            cpu_seconds=_median(
                line["cpu_seconds"] / line["images"]
                for line in lines
                if line["cpu_seconds"] is not None
            ),
            host=_median(hosts),
            graphs=_per_graph(lines),
            calls={
                name: statistics.median(
                    line["graphs"].get(name, {"calls": 0})["calls"] for line in lines
                )
                for name in _graphs(lines)
            },
            target_rounds=statistics.fmean(line["target_rounds"] for line in lines),
            target_calls=statistics.fmean(line["target_calls"] for line in lines),
            draft_calls=statistics.fmean(line["draft_calls"] for line in lines),
            peak_memory_mb=max(line["peak_memory_mb"] for line in lines),
            acceptance=_total(lines, "accepted") / judged if judged else None,
            replaced=own / judged if judged else None,
            distance=sum(line["distance_sum"] for line in lines) / judged if judged else None,
            score=scores[-1]["score"] if scores else {},
            interval=scores[-1].get("interval", {}) if scores else {},
            redrawn=scores[-1].get("redrawn", {}) if scores else {},
        )

    @cached_property
    def load(self) -> float | None:
        """Median load of the machine while it measured."""
        return _median(line["load"] for line in self.lines[1:] if "load" in line)

    @cached_property
    def by_processor_time(self) -> bool:
        """Whether speeds are compared by processor time: other programs kept the machine busy."""
        busy = self.load is not None and self.load > float(self.header["host"]["cpus"]) + 0.5
        batches = [line for line in self.lines[1:] if line["kind"] == "batch"]
        return busy and all(line["cpu_seconds"] is not None for line in batches)

    @property
    def clock(self) -> str:
        """What times are compared by."""
        return "processor time" if self.by_processor_time else "wall-clock time"

    def cost(self, item: Summary) -> float:
        """Seconds per image by the clock that can be trusted."""
        by_processor = self.by_processor_time and item.cpu_seconds is not None
        return item.cpu_seconds if by_processor else item.seconds  # type: ignore[return-value]

    def speedup(self, item: Summary, reference: Summary) -> float:
        """How many times as fast as `reference`, by the clock that can be trusted."""
        return self.cost(reference) / self.cost(item)

    def speed_interval(self, item: Summary, reference: Summary) -> list[float] | None:
        """Both ends of the 95 % interval of `speedup`: bootstrap of the batches of both.

        None for fewer than `LEAST_BATCHES` batches.
        """
        if min(item.batches, reference.batches) < LEAST_BATCHES:
            return None
        ours, theirs = (self._redrawn_costs(part) for part in (item, reference))
        return interval(self.speedup(item, reference), theirs / ours)

    def _redrawn_costs(self, item: Summary) -> Tensor:
        """Medians of redrawn batches, [REPLICATES]."""
        clock = "cpu_seconds" if self.by_processor_time else "seconds"
        times = torch.tensor([line[clock] / line["images"] for line in self.batches(item.point.id)],
                             dtype=torch.float64)  # fmt: skip
        key = int(hashlib.sha256(item.point.id.encode()).hexdigest()[:15], 16)
        classes = torch.zeros(len(times), dtype=torch.long)
        return replicates(lambda rows: times[rows].quantile(0.5).item(), classes, key)

    def baseline(self, batch_size: int, backend: str | None = None) -> Summary | None:
        """The target with as many autoregressive steps as everything else, at one batch size."""
        for point in self.points.values():
            config = point.config
            plain = {**neutral(config.model_dump()), "batch_size": batch_size}
            if (
                config.method == "target"
                and self.batches(point.id)
                and plain == {**neutral(self.main.config.model_dump()), "batch_size": batch_size}
                and config.batch_size == batch_size
                and point.backend == (backend or self.main.backend)
            ):
                return self.summary(point)
        return None

    @property
    def main(self) -> Point:
        """The setting that speed ratios refer to: the target with the steps of everything else."""
        return next(point for point in self.points.values() if "main" in point.serves)


def _order(item: Summary) -> tuple[Any, ...]:
    """Targets with the most steps first, then the draft, then the methods; options ascending."""
    config = item.point.config
    rank = ("target", "draft", "cspd", "lossless", "auto").index(config.method)
    swept = (config.batch_size, config.gamma, config.align, config.prefill, config.cfg)
    return rank, -config.num_iter, *swept, config.temperature


def neutral(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide which distribution the target draws from, and with which noise."""
    names = ("num_iter", "head_steps", "cfg", "cfg_schedule", "temperature", "seed")
    return {name: values[name] for name in names}


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _total(lines: list[Line], name: str) -> int:
    return sum(line["verdicts"][name] for line in lines)


def _per_graph(lines: list[Line]) -> dict[str, float]:
    return {
        name: statistics.median(
            line["graphs"].get(name, {"seconds": 0.0})["seconds"] / line["images"] for line in lines
        )
        for name in _graphs(lines)
    }


def _graphs(lines: list[Line]) -> list[str]:
    return sorted({name for line in lines for name in line["graphs"]})
