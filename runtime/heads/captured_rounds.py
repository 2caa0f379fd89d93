"""Speculative rounds on a GPU as CUDA graphs: `speculative_loop` for backends without loops.

One graph is one whole round: candidates are gathered, the round is played, tokens move, outcomes
are noted, all on the device. The host queues rounds and reads whether any token is left one round
behind, so that the GPU never waits for it. A round too many changes nothing: finished tokens do not
move. Every token has a full window of rows in every round, which keeps the shapes fixed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from cspd.engines.errors import CspdError
from cspd.engines.sessions.cuda_graph import Graphs, GraphStats, TorchGraphs, relative_error
from cspd.engines.sessions.session import ForkableSession, Session, TimedSession
from cspd.engines.spec import GraphSpec
from cspd.runtime.heads.captured import bucket

CANDIDATES = 8  # of a refusal, in one round: what `speculative_round` takes
MAX_GRAPHS = 24
TOLERANCE = 1e-4
# The axis of the tokens in each input that has one.
TOKEN_AXES = {
    "x": 0, "step": 0, "x0": 0, "fraction": 0, "conditions": 1, "guidance": 0, "temperature": 0,
    "noise": 1, "log_accept": 1, "candidates": 0, "choices": 0,
}  # fmt: skip
MOVED = ("x", "x0", "fraction", "mean", "log_std")  # replaced where a token moves
CONSTANT = (
    "guidance", "temperature", "noise", "log_accept", "schedule", "draft_state", "draft_noise",
)  # fmt: skip
SAME = ("schedule", "draft_state", "draft_noise", "last_row")
OUTPUTS = {
    "next_x": "x", "next_x0": "x0", "next_fraction": "fraction", "mean": "mean",
    "log_std": "log_std", "sum_log_std": "sum_log_std", "next_step": "step", "moved": "moved",
    "drawn": "drawn",
}  # fmt: skip


class Watch(Protocol):
    """Reads a flag of the device without making it wait."""

    def done(self, running: Tensor) -> bool:
        """Note `running` [] bool; whether the one noted before was false already."""
        ...

    def reset(self) -> None:
        """Forget what was noted."""
        ...


class HostWatch:
    """For the CPU, where everything has happened when a call returns."""

    def done(self, running: Tensor) -> bool:
        """Whether nothing runs any more."""
        return not bool(running)

    def reset(self) -> None:
        """There is nothing to forget."""


class CudaWatch:
    """Two flags in pinned memory: one is filled while the other, a round older, is read."""

    def __init__(self) -> None:
        self._flags = torch.empty(2, dtype=torch.bool, pin_memory=True)
        self._filled = [torch.cuda.Event() for _ in range(2)]
        self._count = 0

    def done(self, running: Tensor) -> bool:
        """Queue the copy of `running`; whether the flag before it was false."""
        current, before = self._count % 2, (self._count + 1) % 2
        self._flags[current].copy_(running, non_blocking=True)
        self._filled[current].record()
        self._count += 1
        if self._count == 1:
            return False
        self._filled[before].synchronize()
        return not bool(self._flags[before])

    def reset(self) -> None:
        """Begin with another call."""
        self._count = 0


@dataclass
class _Tokens:
    """The buffers of one shape, and what plays a round on them; see `round_graph.round_spec`."""

    session: Session
    modulate: Session | None
    inputs: dict[str, Tensor]
    state: dict[str, Tensor] = field(init=False)
    rows: dict[str, Tensor] = field(init=False)
    table: Tensor | None = None
    begin: Callable[[], None] = field(init=False)
    advance: Callable[[], None] = field(init=False)
    loaded: dict[str, Tensor] = field(default_factory=dict)
    expected: int = 0  # rounds that are queued before the first look

    def __post_init__(self) -> None:
        x, candidates = self.inputs["x"], self.inputs["candidates"]
        tokens, pool, window = *candidates.shape[:2], self.inputs["draft_noise"].shape[-1]
        log = x.new_zeros(tokens, pool, dtype=torch.int32)
        self.state = {
            **{name: torch.zeros_like(x) for name in (*MOVED, "sum_log_std")},
            "step": self.inputs["step"].clone(), "used": log[:, 0].clone(),
            "moved": log.clone(), "drawn": log.clone(),
            "number": x.new_zeros(1, dtype=torch.int64),
            "running": x.new_ones((), dtype=torch.bool),
        }  # fmt: skip
        row = torch.arange(tokens * window, dtype=torch.int32, device=x.device)
        token = torch.arange(tokens, dtype=torch.int32, device=x.device)
        self.rows = {
            "row": row, "row_token": row // window, "slot": row.view(tokens, window),
            "token": token, "offset": torch.arange(CANDIDATES, device=x.device),
        }  # fmt: skip
        self.begin, self.advance = self.start, self.play

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the inputs of another call, of as many tokens or fewer: the others are finished.

        What a schedule gives is the same from call to call.
        """
        count = len(tensors["x"])
        for name, value in tensors.items():
            if name in TOKEN_AXES:
                self.inputs[name].narrow(TOKEN_AXES[name], 0, count).copy_(value)
            elif self.loaded.get(name) is not value:
                self.inputs[name].copy_(value)
        self.inputs["step"][count:] = -1
        self.loaded = {name: tensors[name] for name in SAME}

    def start(self) -> None:
        """The state before the first round, and the table of modulations, from the inputs."""
        for name in ("x", "x0", "fraction", "step"):
            self.state[name].copy_(self.inputs[name])
        for name in ("mean", "log_std", "sum_log_std", "used", "moved", "drawn", "number"):
            self.state[name].zero_()
        if self.modulate is not None:
            conditions, schedule = self.inputs["conditions"], self.inputs["schedule"]
            table = self.modulate(conditions=conditions, schedule=schedule)["modulation"]
            if self.table is None:
                self.table = torch.empty_like(table)
            self.table.copy_(table)

    def play(self) -> None:
        """One round of all tokens that are not finished and have candidates left."""
        state = self.state
        active = self._active()
        out = self._round(active)
        moved, drawn = (torch.where(active, out[name], 0) for name in ("moved", "drawn"))
        wide = (moved > 0)[:, None]
        new = {name: out.get(f"next_{name}", out.get(name)) for name in MOVED}
        for name, value in new.items():
            assert value is not None
            state[name].copy_(torch.where(wide, value, state[name]))
        state["sum_log_std"].add_(torch.where(wide, out["sum_log_std"], 0.0))
        state["step"].copy_(torch.where(moved > 0, out["next_step"], state["step"]))
        state["used"].add_(drawn)
        # Rounds that come too late add nothing to the last column.
        column = state["number"].clamp(max=state["moved"].shape[1] - 1)
        for name, value in (("moved", moved), ("drawn", drawn)):
            state[name].index_add_(1, column, value[:, None])
        state["number"].add_(1)
        state["running"].copy_(self._active().any())

    def _active(self) -> Tensor:
        pool = self.state["moved"].shape[1]
        return (self.state["step"] >= 0) & (self.state["used"] <= pool - CANDIDATES)

    def _round(self, active: Tensor) -> dict[str, Tensor]:
        state, inputs, rows = self.state, self.inputs, self.rows
        length = embedding(state["step"].clamp(min=0), inputs["last_row"][:, None])[:, 0] + 1
        first = rows["token"] * state["moved"].shape[1] + state["used"].clamp(
            max=state["moved"].shape[1] - CANDIDATES
        )
        taken = first[:, None] + rows["offset"]
        supply = {n: embedding(taken, inputs[n].flatten(0, 1)) for n in ("candidates", "choices")}
        return self.session(
            x=state["x"], step=state["step"], x0=state["x0"], fraction=state["fraction"],
            **{name: inputs[name] for name in CONSTANT}, **supply, **self._condition(),
            row=rows["row"], row_token=rows["row_token"], slot=rows["slot"],
            length=torch.where(active, length, 0),
        )  # fmt: skip

    def _condition(self) -> dict[str, Tensor]:
        """What the tokens of a round are conditioned on."""
        if self.table is None:
            return {"conditions": self.inputs["conditions"]}
        return {"modulation": self.table, "origin": self.rows["token"]}


class CapturedRounds:
    """Takes and returns what `speculative_loop` does, in rounds that are CUDA graphs.

    Rounds run eagerly in the first call with a shape, are captured after it, and are given up with
    a note if the first replay differs. Outputs are overwritten by the next call.
    """

    def __init__(
        self, session: TimedSession, modulate: TimedSession | None, *,
        on_fallback: Callable[[str], None], graphs: Graphs | None = None,
    ) -> None:  # fmt: skip
        """`session` is one of `speculative_round`; with `modulate`, of its hoisted twin."""
        self.session, self.modulate, self.stats = session, modulate, GraphStats()
        self._graphs, self._on_fallback = graphs or TorchGraphs(), on_fallback
        self._watch: Watch = CudaWatch() if session.device.type == "cuda" else HostWatch()
        self._known: dict[tuple[object, ...], _Tokens] = {}

    @property
    def spec(self) -> GraphSpec:
        """Contract of the round."""
        return self.session.spec

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.session.device

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Play rounds until every token is done, or its candidates are."""
        count, window = len(tensors["x"]), tensors["draft_noise"].shape[-1]
        width = bucket(count, self.spec.axes["rows"].max // window)
        key = tuple((name, *_shape(name, tensors[name], width)) for name in sorted(tensors))
        tokens = self._known.get(key)
        if tokens is None:
            tokens = self._known[key] = self._first(tensors, width)
        else:
            tokens.load(tensors)
            self._play(tokens)
            captured = tokens.advance != tokens.play
            self.stats.replayed += captured
            self.stats.eager += not captured
        return {name: tokens.state[source][:count] for name, source in OUTPUTS.items()}

    def _play(self, tokens: _Tokens) -> None:
        """All rounds of a call; `expected` of them before the first look, learnt from the last."""
        start, pool, number = time.perf_counter(), tokens.state["moved"].shape[1], 0
        tokens.begin()
        self._watch.reset()
        while number < pool:
            tokens.advance()
            number += 1
            if number > tokens.expected and self._watch.done(tokens.state["running"]):
                break
        # One fewer than were needed: the look at the next call may then find it was shorter.
        tokens.expected = max(0, number - 2)
        if self.modulate is not None:
            self.modulate.stats.calls += 1
        self.session.stats.calls += number
        self.session.stats.seconds += time.perf_counter() - start

    def _first(self, tensors: Mapping[str, Tensor], width: int) -> _Tokens:
        """The eager result, which also warms up; the shape is captured for the next time."""
        sessions = [timed.session for timed in (self.session, self.modulate) if timed]
        forks, refusal = [], None
        for session in sessions:
            assert isinstance(session, ForkableSession)
            refusal = refusal or session.capture_refusal()
            forks.append(session.fork())
        modulate = forks[1] if len(forks) > 1 else None
        inputs = {name: _widened(name, tensor, width) for name, tensor in tensors.items()}
        tokens = _Tokens(forks[0], modulate, inputs)
        tokens.load(tensors)
        self._play(tokens)
        self.stats.eager += 1
        if refusal is None and self.stats.captured >= MAX_GRAPHS:
            refusal = f"{MAX_GRAPHS} shapes are captured already; use fewer sizes"
        refusal = refusal or self._capture(tokens)
        if refusal is not None:
            self.stats.fallbacks.append(refusal)
            self._on_fallback(f"no CUDA graph for rounds of {width} tokens: {refusal}")
        return tokens

    def _capture(self, tokens: _Tokens) -> str | None:
        """Let `tokens` replay graphs; returns why they must not be used, or None."""
        expected = {name: tokens.state[name].clone() for name in OUTPUTS.values()}
        eager = tokens.begin, tokens.advance
        try:
            begin, advance = (self._graphs.capture(work) for work in eager)
            tokens.begin, tokens.advance = begin, advance
            self._play(tokens)
            refusal = _difference(tokens.state, expected)
        except (RuntimeError, CspdError) as error:
            refusal = f"capture failed: {str(error).splitlines()[0]}"
        if refusal is None:
            self.stats.captured += 1
            return None
        tokens.begin, tokens.advance = eager
        for name, value in expected.items():
            tokens.state[name].copy_(value)
        return refusal


def _difference(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What is not as `expected`: numbers of rounds exactly, values up to rounding."""
    for name, value in expected.items():
        if not value.is_floating_point():
            distance = float((state[name] != value).sum())
        else:
            distance = relative_error(state[name], value)
        if not distance <= (TOLERANCE if value.is_floating_point() else 0):
            return f"the first replay differs from the eager run: {name} by {distance:.3g}"
    return None


def _shape(name: str, tensor: Tensor, tokens: int) -> tuple[int, ...]:
    """Shape of an input for so many `tokens`."""
    axis = TOKEN_AXES.get(name)
    return tuple(tokens if place == axis else size for place, size in enumerate(tensor.shape))


def _widened(name: str, tensor: Tensor, tokens: int) -> Tensor:
    """A copy for so many `tokens`, the last one once more: any numbers do that are finite."""
    axis = TOKEN_AXES.get(name)
    if axis is None:
        return tensor.clone()
    index = torch.arange(tokens, device=tensor.device).clamp(max=tensor.shape[axis] - 1)
    return tensor.index_select(axis, index)
