"""One of two heads, call by call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cspd.engines.schedule import Schedule
from cspd.engines.sessions.session import Session
from cspd.runtime.heads.base import Head, HeadSample, Rows
from cspd.runtime.heads.plain import ahead_of_steps
from cspd.runtime.noise import Noise, Purpose


@dataclass(frozen=True)
class Switch:
    """`head` for the calls that `suits` it, `other` for the rest; both sample one distribution."""

    suits: Callable[[Rows, Schedule], bool]
    head: Head
    other: Head

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row."""
        head = self.head if self.suits(rows, schedule) else self.other
        return head(rows, schedule, noise, purpose)


def few(up_to: int) -> Callable[[Rows, Schedule], bool]:
    """Whether a call samples at most `up_to` tokens."""
    return lambda rows, schedule: len(rows.images) <= up_to


@dataclass(frozen=True)
class Room:
    """Whether the table of `modulate` (head_modulation) has room in `memory` bytes.

    `padded` is the number of tokens of the call that carries so many. More tokens would need more
    calls with fewer rows each; then the graphs that compute the modulations of every row again are
    better.
    """

    modulate: Session
    memory: int
    padded: Callable[[int], int]

    def holds(self, rows: Rows, schedule: Schedule) -> bool:
        """Whether one table holds all that a call takes of `rows`."""
        tokens, axes = self.padded(len(rows.images)), self.modulate.spec.axes
        fits = tokens <= axes["tokens"].max and schedule.num_steps <= axes["steps"].max
        return fits and tokens * ahead_of_steps(self.modulate, schedule, rows) <= self.memory
