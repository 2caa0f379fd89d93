"""Speculative denoising with all rounds in one session call, for backends that can loop.

The same samples from the same random numbers as `lossless.SpeculativeHead`, up to rounding; without
the host between rounds, and with the head's modulations computed once ahead of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cspd.engines.schedule import Schedule
from cspd.engines.session import Session
from cspd.runtime.chain_numbers import ChainNumbers, MakeNumbers
from cspd.runtime.lossless import RESULTS, join
from cspd.runtime.member import DEFAULT_MEMORY, Rows, part_of, tokens_within
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.round_check import Counts, check_progress
from cspd.runtime.rounds import DraftTables, depths_of
from cspd.runtime.speculation import SpeculationOptions, SpeculativeSample, StepLog

POOL = 64  # candidates of a token in one call; a chain of 100 steps takes about 15
ADVANCED = ("x", "step", "x0", "fraction")

State = dict[str, Tensor]


class SpeculativeLoopHead:
    """Samples tokens with the graph `speculative_loop`.

    Calls are cut so that the modulations fit into `memory` bytes.
    """

    def __init__(
        self, session: Session, options: SpeculationOptions, *, memory: int = DEFAULT_MEMORY,
        numbers: MakeNumbers = ChainNumbers,
    ) -> None:  # fmt: skip
        self.session, self.options, self.memory, self.numbers = session, options, memory, numbers
        self._drafts = DraftTables(options.window)

    @torch.inference_mode()
    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose = Purpose.DENOISE,
        *, depth: np.ndarray | None = None,
    ) -> SpeculativeSample:  # fmt: skip
        """As `lossless.SpeculativeHead`."""
        constant = {
            **self._drafts(schedule), "schedule": schedule.table,
            "last_row": self._last_rows(schedule.num_steps, depth),
        }  # fmt: skip
        limit = tokens_within(self.session, self.memory, schedule, rows)
        limit = min(limit, self.options.max_tokens or limit)
        chain = _Chain(self, self.numbers(noise, purpose), constant, limit)
        starts = range(0, len(rows.images), limit)
        return join([chain.sample(part_of(rows, i, i + limit)) for i in starts])

    def _last_rows(self, num_steps: int, depth: np.ndarray | None) -> Tensor:
        """The last row of a window by step; if calls have one shape, always that of the window."""
        depth = depths_of(self.options.window, num_steps, depth)
        if self.options.row_buckets:
            depth = np.full(num_steps, self.options.window)
        return torch.from_numpy(depth.astype(np.int32) - 1).to(self.session.device)


@dataclass(frozen=True)
class _Chain:
    """The sampling of tokens that share their calls, of at most `limit` tokens each."""

    head: SpeculativeLoopHead
    numbers: ChainNumbers
    constant: State
    limit: int

    def sample(self, tokens: Rows) -> SpeculativeSample:
        """Call the loop until every token is done: once, but for a token in many thousand."""
        count, steps = len(tokens.images), len(self.constant["schedule"])
        padded = min(self.head.options.padded_tokens(count), self.limit)
        tokens = tokens.take(torch.arange(padded).clamp(max=count - 1))
        log, state, shared = StepLog(count, steps), *self._start(tokens, count)
        results = {name: torch.zeros_like(state["x"]) for name in RESULTS}
        used = torch.zeros_like(tokens.images)
        while True:
            candidates = self.numbers.candidates(
                tokens.images, tokens.positions, used, POOL, state["x"].shape[1]
            )
            named = dict(zip(("candidates", "choices"), candidates, strict=True))
            out = self.head.session(**state, **shared, **named, **self.constant)
            used = used + out["drawn"].sum(1)
            self._log(log, state["step"], out, used)
            _collect(results, state, out)
            if not bool((out["next_step"] >= 0).any()):
                break
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

    def _log(self, log: StepLog, step: Tensor, out: dict[str, Tensor], used: Tensor) -> None:
        """Check and add the rounds of a call. Finished tokens still cost the rows of step 0."""
        numbers = (step, out["next_step"], out["moved"], out["drawn"], used)
        counts = Counts(*(value.numpy(force=True) for value in numbers))
        check_progress(counts, POOL, log.num_steps)
        start, moved, drawn = counts.step, counts.moved, counts.drawn
        last_row = self.constant["last_row"].numpy(force=True)
        rounds = int(((moved > 0) | (drawn > 0)).any(0).sum())
        for number in range(rounds):
            rows = int((last_row[start.clip(min=0)] + 1).sum())
            taken = moved[:, number]
            log.add(start[: log.tokens], taken[: log.tokens], drawn[: log.tokens, number], rows)
            start = start - taken


def _collect(results: State, state: State, out: dict[str, Tensor]) -> None:
    """Take the tokens that a call has finished; sums continue over calls."""
    finished = ((out["next_step"] < 0) & (state["step"] >= 0))[:, None]
    values = (out["next_x"], out["mean"], out["log_std"])
    for name, value in zip(("sample", "mean", "log_std"), values, strict=True):
        results[name] = torch.where(finished, value, results[name])
    results["sum_log_std"] = results["sum_log_std"] + out["sum_log_std"]
