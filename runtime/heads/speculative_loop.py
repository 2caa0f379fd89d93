"""Speculative denoising with all rounds in one session call.

Of a graph that loops, or of `captured_rounds`. The same samples from the same random numbers as
`speculative.SpeculativeHead`, up to rounding; without the host between rounds, and with the head's
modulations computed once ahead of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cspd.engines.schedule import Schedule
from cspd.engines.sessions.session import Session
from cspd.runtime.heads.base import Rows, part_of
from cspd.runtime.heads.drafts import DraftTables, depths_of
from cspd.runtime.heads.numbers import ChainNumbers, MakeNumbers
from cspd.runtime.heads.plain import DEFAULT_MEMORY, tokens_within
from cspd.runtime.heads.round_check import Counts, check_progress
from cspd.runtime.heads.speculation import SpeculationOptions, SpeculativeSample, StepLog
from cspd.runtime.heads.speculative import join
from cspd.runtime.noise import Noise, Purpose

POOL = 64  # candidates of a token in one call; a chain of 100 steps takes about 15
ADVANCED = ("x", "step", "x0", "fraction")

State = dict[str, Tensor]


class SpeculativeLoopHead:
    """Samples tokens with the graph `speculative_loop`, or what stands in for it.

    Calls are cut so that the modulations fit into `memory` bytes. `first`, where given, is a head
    in float32 that takes the first step of every chain.
    """

    def __init__(
        self, session: Session, options: SpeculationOptions, *, memory: int = DEFAULT_MEMORY,
        numbers: MakeNumbers = ChainNumbers, first: Session | None = None,
    ) -> None:  # fmt: skip
        self.session, self.options, self.memory, self.numbers = session, options, memory, numbers
        self.first = first
        self._drafts = DraftTables(options.window)

    @torch.inference_mode()
    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose = Purpose.DENOISE
    ) -> SpeculativeSample:
        """As `speculative.SpeculativeHead`."""
        last_row = self._last_rows(schedule.num_steps)
        constant = {
            **self._drafts(schedule), "schedule": schedule.table,
            "last_row": torch.from_numpy(last_row).to(self.session.device),
        }  # fmt: skip
        limit = tokens_within(self.session, self.memory, schedule, rows)
        limit = min(limit, self.options.max_tokens or limit)
        chain = _Chain(self, self.numbers(noise, purpose), constant, last_row, limit)
        starts = range(0, len(rows.images), limit)
        return join([chain.sample(part_of(rows, i, i + limit)) for i in starts])

    def _last_rows(self, num_steps: int) -> np.ndarray:
        """The last row of a window by step; if calls have one shape, always that of the window."""
        depth = depths_of(self.options.window, num_steps)
        if self.options.row_buckets:
            depth = np.full(num_steps, self.options.window)
        return depth.astype(np.int32) - 1


@dataclass(frozen=True)
class _Chain:
    """The sampling of tokens that share their calls, of at most `limit` tokens each."""

    head: SpeculativeLoopHead
    numbers: ChainNumbers
    constant: State
    last_row: np.ndarray
    limit: int

    def sample(self, tokens: Rows) -> SpeculativeSample:
        """Call the loop until every token is done: once, but for a token in many thousand."""
        count, num_steps = len(tokens.images), len(self.last_row)
        padded = min(self.head.options.padded_tokens(count), self.limit)
        if padded > count:
            tokens = tokens.take(torch.arange(padded).clamp(max=count - 1))
        log, state, shared = StepLog(count, num_steps), *self._start(tokens, count)
        results: State = {}
        step = np.where(np.arange(padded) < count, num_steps - 1, -1)
        if self.head.first is not None:
            state, results["sum_log_std"] = _first_step(
                self.head.first, state, shared, self.constant["schedule"]
            )
            log.add(step[:count], np.ones(count, int), np.zeros(count, int), padded)
            step = np.maximum(step - 1, -1)
        used, drawn = np.zeros(padded, dtype=np.int64), torch.zeros_like(tokens.images)
        while True:
            candidates = self.numbers.candidates(
                tokens.images, tokens.positions, drawn if used.any() else 0, POOL,
                state["x"].shape[1],
            )  # fmt: skip
            named = dict(zip(("candidates", "choices"), candidates, strict=True))
            out = self.head.session(**state, **shared, **named, **self.constant)
            counts = _on_host(step, out, used)
            self._log(log, counts)
            results = _collect(results, state, out)
            step, used = counts.after, counts.used
            if (step < 0).all():
                break
            drawn = drawn + out["drawn"].sum(1)
            # A session may overwrite its outputs in the next call.
            results = {name: value.clone() for name, value in results.items()}
            state = {name: out[f"next_{name}"].clone() for name in ADVANCED}
        return SpeculativeSample(
            **{name: value[:count] for name, value in results.items()}, stats=log.stats()
        )

    def _start(self, tokens: Rows, count: int) -> tuple[State, State]:
        """State before the first step, padding being finished, and what stays the same."""
        steps, channels = len(self.constant["schedule"]), self.head.session.spec.inputs[0].shape[-1]
        assert isinstance(channels, int)
        x, noise = self.numbers.chain(tokens.images, tokens.positions, steps, channels)
        step = torch.full_like(tokens.images, steps - 1, dtype=torch.int32)
        step[count:] = -1
        # Before the first evaluation the draft predicts the centre of the data.
        zero = torch.zeros_like(x)
        state = {"x": x, "step": step, "x0": zero, "fraction": zero + 0.5}
        shared = {
            "conditions": tokens.conditions, "guidance": tokens.guidance,
            "temperature": tokens.temperature, "noise": noise,
            "log_accept": self.numbers.tests(tokens.images, tokens.positions, steps),
        }  # fmt: skip
        return state, shared

    def _log(self, log: StepLog, counts: Counts) -> None:
        """Check and add the rounds of a call. Finished tokens still cost the rows of step 0."""
        check_progress(counts, POOL, log.num_steps)
        start, moved, drawn = counts.step, counts.moved, counts.drawn
        rounds = int(((moved > 0) | (drawn > 0)).any(0).sum())
        for number in range(rounds):
            rows = int((self.last_row[start.clip(min=0)] + 1).sum())
            taken = moved[:, number]
            log.add(start[: log.tokens], taken[: log.tokens], drawn[: log.tokens, number], rows)
            start = start - taken


def _first_step(
    first: Session, state: State, shared: State, schedule: Tensor
) -> tuple[State, Tensor]:
    """`state` after the first step of every chain, taken plainly, and the log_std of that step."""
    step = (len(shared["noise"]) - 1) * torch.ones_like(state["step"])
    out = first(
        x=state["x"], step=step, token=torch.arange(len(step), device=step.device).int(),
        conditions=shared["conditions"], guidance=shared["guidance"], schedule=schedule,
    )  # fmt: skip
    added = shared["temperature"][:, None] * out["log_std"].exp() * shared["noise"][-1]
    after = (state["step"] - 1).clamp(min=-1)
    advanced = {"x": out["mean"] + added, "step": after, "x0": out["x0"].clone()}
    return {**advanced, "fraction": out["fraction"].clone()}, out["log_std"].clone()


def _on_host(step: np.ndarray, out: State, used: np.ndarray) -> Counts:
    """What a call did, in one transfer; `step` and `used` are those before it."""
    pool = out["moved"].shape[1]
    parts = torch.cat([out["next_step"][:, None], out["moved"], out["drawn"]], dim=1)
    after, moved, drawn = np.split(parts.numpy(force=True), (1, 1 + pool), axis=1)
    return Counts(step, after[:, 0], moved, drawn, used + drawn.sum(1))


def _collect(results: State, state: State, out: State) -> State:
    """`results` with the tokens that a call has finished; sums continue over calls."""
    found = {"sample": out["next_x"], "mean": out["mean"], "log_std": out["log_std"]}
    if "sample" in results:
        finished = ((out["next_step"] < 0) & (state["step"] >= 0))[:, None]
        found = {name: torch.where(finished, new, results[name]) for name, new in found.items()}
    before = results.get("sum_log_std", 0)
    return {**found, "sum_log_std": before + out["sum_log_std"]}
