"""Transformers and denoising loops on a GPU as CUDA graphs, captured once per bucket of shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cspd.engines.sessions.cuda_graph import CapturedLoop, Graphs
from cspd.engines.sessions.session import ForkableSession, Session, TimedSession
from cspd.engines.spec import GraphSpec
from cspd.runtime.heads.plain import Loop, step_limit, step_loop

# Axis of the rows in each input of a loop; the schedule has none.
ROW_AXES = {"noise0": 0, "noise": 1, "conditions": 1, "guidance": 0, "temperature": 0}
# Powers of two up to 1024 rows, with and without guidance.
MAX_GRAPHS = 24
# Visible tokens are padded to a multiple of this: nine transformers an image of 256 tokens.
VISIBLE_STEP = 32
# Single calls: transformers by their visible tokens, and by powers of two of the positions.
MAX_CALLS = 64


@dataclass(frozen=True)
class CapturedCall:
    """A session whose calls are CUDA graphs, one for each combination of shapes."""

    session: TimedSession
    loop: CapturedLoop

    @property
    def spec(self) -> GraphSpec:
        """Contract of the network."""
        return self.session.spec

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.session.device

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run the network once."""
        start = time.perf_counter()
        outputs = self.loop(**tensors)
        self.session.stats.calls += 1
        self.session.stats.seconds += time.perf_counter() - start
        return outputs


@dataclass(frozen=True)
class CapturedBackbone(CapturedCall):
    """A transformer as a CUDA graph for each bucket of visible tokens and of positions."""

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run the transformer; padding is hidden by `visible_len`, or cut off again."""
        axes = self.session.spec.axes
        visible, positions = tensors["visible"], tensors["positions"]
        known, asked = visible.shape[1], positions.shape[1]
        width = min(-(-known // VISIBLE_STEP) * VISIBLE_STEP, axes["visible"].max)
        repeated = bucket(asked, axes["positions"].max) - asked
        if width > known:
            tensors["visible"] = pad(visible, (0, width - known))
        if repeated:
            tensors["positions"] = torch.cat([positions, positions[:, -1:].repeat(1, repeated)], 1)
        return {"z": super().__call__(**tensors)["z"][:, :asked]}


def captured_call(
    session: TimedSession, make: type[CapturedCall] = CapturedCall, *,
    on_fallback: Callable[[str], None], graphs: Graphs | None,
) -> Session:  # fmt: skip
    """`session` as CUDA graphs, or as it is where none can be."""
    inner = session.session
    if not isinstance(inner, ForkableSession):
        return session

    def make_run() -> Loop:
        fork = inner.fork()
        return lambda **tensors: fork(**tensors)

    loop = CapturedLoop(
        make_run, on_fallback=on_fallback, refusal=inner.capture_refusal, graphs=graphs,
        max_graphs=MAX_CALLS,
    )  # fmt: skip
    return make(session, loop)


@dataclass(frozen=True)
class CapturedSteps:
    """The loop over three sessions (see StepHead), as a CUDA graph per row bucket.

    Takes and returns what `denoiser_loop` does; the results are the caller's own.
    """

    session: TimedSession
    first: TimedSession | None
    modulate: TimedSession | None
    loop: CapturedLoop

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Run the loop on the smallest bucket that holds the rows."""
        start, rows = time.perf_counter(), len(tensors["noise0"])
        width = bucket(rows, step_limit(self.session))
        # The last row once more where there are too few: any numbers do that are finite.
        index = torch.arange(width, device=tensors["noise0"].device).clamp(max=rows - 1)
        padded = {
            name: tensor.index_select(ROW_AXES[name], index) if name in ROW_AXES else tensor
            for name, tensor in tensors.items()
        }
        results = {name: value[:rows].clone() for name, value in self.loop(**padded).items()}
        self._count(len(tensors["schedule"]), time.perf_counter() - start)
        return results

    def _count(self, steps: int, seconds: float) -> None:
        """A replay passes by the sessions, so their statistics are kept here."""
        if self.first is not None:
            self.first.stats.calls += 1
            steps -= 1
        if self.modulate is not None:
            self.modulate.stats.calls += 1
        self.session.stats.calls += steps
        self.session.stats.seconds += seconds


def captured_steps(
    session: TimedSession, first: TimedSession | None, modulate: TimedSession | None, *,
    on_fallback: Callable[[str], None], graphs: Graphs | None,
) -> CapturedSteps | None:  # fmt: skip
    """The captured loop over the sessions; None if they are not of an engine."""
    engines: list[ForkableSession | None] = []
    for timed in (session, first, modulate):
        engine = timed.session if timed else None
        if not (engine is None or isinstance(engine, ForkableSession)):
            return None
        engines.append(engine)
    steps, *rest = engines
    assert steps is not None

    def make_run() -> Loop:
        return step_loop(steps.fork(), *(engine.fork() if engine else None for engine in rest))

    def refusal() -> str | None:
        reasons = (engine.capture_refusal() for engine in engines if engine)
        return next(filter(None, reasons), None)

    loop = CapturedLoop(
        make_run, on_fallback=on_fallback, refusal=refusal, graphs=graphs, max_graphs=MAX_GRAPHS
    )
    return CapturedSteps(session, first, modulate, loop)


def bucket(rows: int, limit: int) -> int:
    """The smallest power of two that is not below `rows`; `limit` if that is nearer."""
    return max(rows, min(1 << (rows - 1).bit_length(), limit))
