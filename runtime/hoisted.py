"""Modulations computed ahead of the steps, for as many tokens as the memory holds at once.

More tokens would need more calls with fewer rows each; then the graphs that compute the modulations
of every row again are better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cspd.engines.schedule import Schedule
from cspd.engines.session import Session
from cspd.runtime.adaptive import Speculative
from cspd.runtime.member import Head, HeadSample, Rows, ahead_of_steps
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.speculation import SpeculativeSample


@dataclass(frozen=True)
class Room:
    """Whether the table of `modulate` (head_modulation) has room in `memory` bytes.

    `padded` is the number of tokens of the call that carries so many.
    """

    modulate: Session
    memory: int
    padded: Callable[[int], int]

    def holds(self, rows: Rows, schedule: Schedule) -> bool:
        """Whether one table holds all that a call takes of `rows`."""
        tokens, axes = self.padded(len(rows.images)), self.modulate.spec.axes
        fits = tokens <= axes["tokens"].max and schedule.num_steps <= axes["steps"].max
        return fits and tokens * ahead_of_steps(self.modulate, schedule, rows) <= self.memory


@dataclass(frozen=True)
class WithinMemory:
    """Plain sampling by `hoisted` where the table has room, by `whole` elsewhere."""

    hoisted: Head
    whole: Head
    room: Room

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row."""
        head = self.hoisted if self.room.holds(rows, schedule) else self.whole
        return head(rows, schedule, noise, purpose)


@dataclass(frozen=True)
class SpeculativeWithinMemory:
    """Speculation by `hoisted` where the table has room, by `whole` elsewhere."""

    hoisted: Speculative
    whole: Speculative
    room: Room

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose = Purpose.DENOISE,
        *, depth: np.ndarray | None = None,
    ) -> SpeculativeSample:  # fmt: skip
        """Sample every row, see `lossless.SpeculativeHead`."""
        head = self.hoisted if self.room.holds(rows, schedule) else self.whole
        return head(rows, schedule, noise, purpose, depth=depth)
