"""What a build will take, graph by graph, scaled by size from a build that was measured."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from cspd.engines.console.commands import human_bytes, human_seconds
from cspd.engines.manifest import Precision, Role
from cspd.export.build import BuildOptions
from cspd.export.graphs.networks import EXACT, model_graphs
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import PRESETS
from cspd.export.mar.vae import VaeDecoder

GB = 1e9


@dataclass(frozen=True)
class GraphCost:
    """Seconds and peak memory of an export with its comparison, and of an engine with its size.

    Memory and sizes in bytes; memory is that of the whole process, mapped files included.
    """

    export_seconds: float
    export_memory: float
    engine_seconds: float
    engine_bytes: float
    engine_memory: float


def _row(seconds: float, memory: float, *engine: float) -> GraphCost:
    """A line of the table in evidence/engines.md: s and GB of export, s, GB, GB of the engine."""
    engine_seconds, size, engine_memory = engine or (0, 0, 0)
    return GraphCost(seconds, memory * GB, engine_seconds, size * GB, engine_memory * GB)


# The build in fp16 of docs/evidence/engines.md, on one core.
MEASURED: dict[str, dict[str, GraphCost]] = {
    "mar-h": {
        "backbone": _row(92, 11.62, 23, 1.61, 10.34),
        "denoiser": _row(15, 7.58, 5, 0.309, 7.52),
        "denoiser_first": _row(14, 8.25, 6, 0.610, 8.25),
        "speculative_round": _row(23, 8.30, 7, 0.612, 8.30),
        "head_modulation": _row(11, 7.99, 3, 0.378, 7.71),
        "denoiser_hoisted": _row(12, 6.94, 3, 0.118, 6.94),
        "speculative_round_hoisted": _row(15, 7.20, 4, 0.234, 7.20),
    },
    "mar-b": {
        "backbone": _row(36, 3.66, 9, 0.363, 3.24),
        "denoiser": _row(6, 2.44, 2, 0.075, 2.44),
        "denoiser_first": _row(5, 2.56, 2, 0.146, 2.56),
        "speculative_round": _row(11, 2.60, 3, 0.149, 2.60),
        "head_modulation": _row(4, 2.54, 1, 0.093, 2.43),
        "denoiser_hoisted": _row(5, 2.22, 1, 0.028, 2.22),
        "speculative_round_hoisted": _row(10, 2.32, 2, 0.056, 2.32),
    },
}
# Graphs that this build had not are taken to cost what a similar one does.
LIKE = {"denoiser_loop": "speculative_round", "speculative_loop": "speculative_round"}
NO_ENGINE = {"engine_seconds": 0.0, "engine_bytes": 0.0, "engine_memory": 0.0}
DECODER = _row(42, 3.53, 2, 0.081, 1.63)
# Of that build: all seconds over those of its graphs, resident memory without mapped files over
# that with them.
WHOLE_BUILD = 608 / 375
UNMAPPED = 7.6 / 11.6


@dataclass(frozen=True)
class Estimate:
    """The costs of a build by graph, and the bytes of its weight files. All of it is an estimate.

    `flavours` are the engines built from every graph that has one.
    """

    graphs: Mapping[str, GraphCost]
    weight_bytes: int
    flavours: tuple[str, ...]

    @cached_property
    def seconds(self) -> float:
        """Of the whole build, on one CPU core."""
        engines = sum(cost.engine_seconds for cost in self.graphs.values()) * len(self.flavours)
        return WHOLE_BUILD * (sum(cost.export_seconds for cost in self.graphs.values()) + engines)

    @cached_property
    def memory_bytes(self) -> int:
        """Highest resident size, mapped files included."""
        costs = self.graphs.values()
        engine = max(cost.engine_memory for cost in costs) if self.flavours else 0
        return round(max(engine, *(cost.export_memory for cost in costs)))

    @cached_property
    def least_memory_bytes(self) -> int:
        """The part of `memory_bytes` that the system cannot take back: without mapped files."""
        return round(UNMAPPED * self.memory_bytes)

    @cached_property
    def disk_bytes(self) -> int:
        """Size of the bundle; graphs without their weights are below a megabyte."""
        engines = sum(cost.engine_bytes for cost in self.graphs.values()) * len(self.flavours)
        return round(self.weight_bytes + engines)

    def summary(self) -> str:
        """Time, memory and disk in a line."""
        return (
            f"estimated: {human_seconds(self.seconds)} on one CPU core, "
            f"{human_bytes(self.memory_bytes)} of memory, {human_bytes(self.disk_bytes)} of disk"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data: seconds and bytes, all estimated."""
        return {
            "estimated": True,
            "seconds": round(self.seconds),
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "engines": list(self.flavours),
            "graphs": {label: asdict(cost) for label, cost in self.graphs.items()},
        }


def estimate(presets: Mapping[Role, str], options: BuildOptions) -> Estimate:
    """What a bundle of the models `presets` and the KL-16 decoder takes with `options`."""
    graphs: dict[str, GraphCost] = {}
    weights = 0
    for role, preset in presets.items():
        body, head = parameters(preset)
        weights += _weight_bytes(body + head, options)
        # In reduced precision the head lies there in float32 too.
        weights += 4 * head if options.precision != "fp32" else 0
        for name, has_engine in graph_names(preset, options).items():
            cost = graph_cost(name, body if name == "backbone" else head, options.precision)
            graphs[f"{role}/{name}"] = cost if has_engine else replace(cost, **NO_ENGINE)
    graphs["decoder"] = DECODER
    with torch.device("meta"):
        weights += _weight_bytes(_numbers(VaeDecoder()), options)
    return Estimate(graphs, weights, tuple(engine.flavour for engine in options.engines))


@functools.cache
def graph_names(preset: str, options: BuildOptions) -> dict[str, bool]:
    """The graphs that a model is exported as, and whether engines are built from each."""
    with torch.device("meta"):
        model = Mar(PRESETS[preset])
    hoisted = options.hoisted and bool(options.engines)
    limits = (options.max_batch, options.max_rows)
    graphs = model_graphs(model, *limits, options.precision, model.diffloss, hoisted=hoisted)
    return {name: spec.engines for name, (_, spec) in graphs.items()}


@functools.cache
def parameters(preset: str) -> tuple[int, int]:
    """Numbers in the transformer of a model, and in its diffusion head."""
    with torch.device("meta"):
        model = Mar(PRESETS[preset])
    head = _numbers(model.diffloss)
    return _numbers(model) - head, head


def graph_cost(name: str, size: int, precision: Precision) -> GraphCost:
    """The cost of graph `name` with `size` parameters behind it.

    It lies on the line through the two models that were measured.
    """
    which = 0 if name == "backbone" else 1
    small, large = (parameters(preset)[which] for preset in ("mar-b", "mar-h"))
    share = (size - small) / (large - small)
    source = LIKE.get(name, name)
    ends = (vars(MEASURED[preset][source]).values() for preset in ("mar-b", "mar-h"))
    cost = GraphCost(*(max(0.0, a + share * (b - a)) for a, b in zip(*ends, strict=True)))
    if precision == "fp32" and source not in EXACT:
        return replace(cost, engine_bytes=2 * cost.engine_bytes)
    return cost


def _weight_bytes(numbers: int, options: BuildOptions) -> int:
    return numbers * (4 if options.precision == "fp32" else 2)


def _numbers(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())
