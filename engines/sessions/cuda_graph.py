"""Loops replayed as CUDA graphs: captured once per shape, checked once, given up with a note."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from cspd.engines.errors import CspdError

# A loop: tensors by name in, tensors by name out.
Run = Callable[..., Mapping[str, Tensor]]


class Graphs(Protocol):
    """What records work on a device; CUDA graphs of torch, or a stand-in."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` does, without results yet; returns what replays it."""
        ...


class TorchGraphs:
    """CUDA graphs. The work runs on torch's capture stream and must use torch's current stream.

    All graphs of one object share their memory, so that they need the most of any and not the sum.
    Work must therefore write what outlives its replay to tensors that were made before.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work` in a new graph."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


@dataclass
class GraphStats:
    """Calls of a captured loop by how they ran, and why some shapes run without a graph."""

    captured: int = 0
    replayed: int = 0
    eager: int = 0
    fallbacks: list[str] = field(default_factory=list)


@dataclass
class _Slot:
    """One shape: the graph's own inputs and outputs, or only the loop, if it cannot be captured."""

    run: Run
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    replay: Callable[[], None] | None = None


class CapturedLoop:
    """A loop that runs as a CUDA graph from its second call with the same shapes on.

    Callers pad to a few row buckets: every combination of input shapes costs a capture. Outputs are
    overwritten by the next call.
    """

    def __init__(
        self,
        make_run: Callable[[], Run],
        *,
        on_fallback: Callable[[str], None],
        graphs: Graphs | None = None,
        refusal: Callable[[], str | None] = lambda: None,
        tolerance: float = 1e-4,
        max_graphs: int = 8,
    ) -> None:
        """`make_run` makes the loop for one shape, on forks of its sessions (see TrtSession.fork).

        `refusal` tells why it cannot be captured, if that is known; `on_fallback` is told the
        reason whenever a shape will run without a graph. The first replay must equal the eager
        run up to `tolerance`, the relative error of the norm, in every output.
        """
        self.stats = GraphStats()
        self._make_run, self._on_fallback, self._refusal = make_run, on_fallback, refusal
        self._graphs = TorchGraphs() if graphs is None else graphs
        self._tolerance, self._max_graphs = tolerance, max_graphs
        self._slots: dict[tuple[object, ...], _Slot] = {}

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run the loop."""
        key = tuple((name, *tensors[name].shape) for name in sorted(tensors))
        slot = self._slots.get(key)
        if slot is None:
            return self._first(key, tensors)
        if slot.replay is None:
            self.stats.eager += 1
            return dict(slot.run(**tensors))
        for name, tensor in tensors.items():
            slot.inputs[name].copy_(tensor)
        slot.replay()
        self.stats.replayed += 1
        return dict(slot.outputs)

    def _first(self, key: tuple[object, ...], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The eager result, which also warms up; the shape is captured for the next time."""
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        refusal = self._refusal()
        if refusal is None and self.stats.captured >= self._max_graphs:
            refusal = f"{self._max_graphs} shapes are captured already; use fewer row buckets"
        slot = _Slot(self._make_run())
        result = {name: tensor.clone() for name, tensor in slot.run(**tensors).items()}
        self.stats.eager += 1
        if refusal is None:
            refusal = self._capture(slot, tensors, result)
        if refusal is not None:
            slot = _Slot(slot.run)
            self.stats.fallbacks.append(refusal)
            self._on_fallback(f"no CUDA graph for shapes {shapes}: {refusal}")
        self._slots[key] = slot
        return result

    def _capture(
        self, slot: _Slot, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> str | None:
        """Fill `slot`; returns why its graph must not be used, or None."""
        slot.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        slot.outputs = {name: torch.empty_like(tensor) for name, tensor in expected.items()}

        def work() -> None:
            for name, value in slot.run(**slot.inputs).items():
                slot.outputs[name].copy_(value)

        try:
            slot.replay = self._graphs.capture(work)
            slot.replay()
        except (RuntimeError, CspdError) as error:
            return f"capture failed: {str(error).splitlines()[0]}"
        for name, value in expected.items():
            distance = relative_error(slot.outputs[name], value)
            if not distance <= self._tolerance:
                return f"the first replay differs from the eager run: {name} by {distance:.3g}"
        self.stats.captured += 1
        return None


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`; NaN if anything is not finite."""
    norm = expected.double().norm()
    difference = (value.double() - expected.double()).norm()
    return float(difference / norm) if norm > 0 else float(difference)
