"""A head that speculates when that pays and steps plainly when it does not, by measured costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cspd.engines.schedule import Schedule
from cspd.runtime.member import Head, HeadSample, Rows
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.speculation import SpeculativeSample
from cspd.runtime.window import Choice, CostRecord, WindowChooser, measure_costs


def ignore_choice(choice: Choice, tokens: int) -> None:
    """The report that does nothing."""


class Speculative(Protocol):
    """A head that counts what it does."""

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose = Purpose.DENOISE,
        *, depth: np.ndarray | None = None,
    ) -> SpeculativeSample:  # fmt: skip
        """Sample every row, evaluating up to `depth` [S] rows of a token at each step."""
        ...


@dataclass(frozen=True)
class AdaptiveHead:
    """`plain` or `speculative`, as `chooser` says for the number of tokens; learns if `learning`.

    Both have one distribution. Turn `learning` off where results must repeat to the bit. On
    CUDA the time of a call includes its one transfer to the host per round, so that no
    synchronisation is missing. `report` hears of every choice.
    """

    plain: Head
    speculative: Speculative
    chooser: WindowChooser
    learning: bool = True
    report: Callable[[Choice, int], None] = field(default=ignore_choice)
    clock: Callable[[], float] = time.perf_counter

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose = Purpose.DENOISE
    ) -> HeadSample:
        """Sample every row; a schedule that costs were not measured for is stepped through."""
        if schedule.num_steps != len(self.chooser.prior):
            return self.plain(rows, schedule, noise, purpose)
        choice = self.chooser.choose(len(rows.images))
        self.report(choice, len(rows.images))
        if choice.depth is None:
            return self.plain(rows, schedule, noise, purpose)
        start = self.clock()
        sampled = self.speculative(rows, schedule, noise, purpose, depth=choice.depth)
        if self.learning:
            self.chooser.observe(choice, sampled.stats, 1000 * (self.clock() - start))
        return sampled


def measure_heads(
    plain: Head, speculative: Callable[[int, int | None], Speculative],
    example: Callable[[int], Rows], schedule: Schedule, noise: Noise, key: str,
    clock: Callable[[], float] = time.perf_counter,
) -> CostRecord:  # fmt: skip
    """Costs of both heads on `example(tokens)` rows.

    `speculative(window, rows)` makes the second; its calls have `rows` rows each, if that is given.
    """

    def step(tokens: int) -> float:
        rows, start = example(tokens), clock()
        plain(rows, schedule, noise, Purpose.DENOISE)
        return 1000 * (clock() - start)

    def speculate(tokens: int, window: int) -> tuple[float, float]:
        rows, head, start = example(tokens), speculative(window, None), clock()
        stats = head(rows, schedule, noise, Purpose.DENOISE).stats
        return stats.rows / stats.calls, 1000 * (clock() - start) / stats.calls

    def whole(tokens: int, window: int) -> float:
        rows, head, start = example(tokens), speculative(window, tokens * window), clock()
        head(rows, schedule, noise, Purpose.DENOISE)
        return 1000 * (clock() - start)

    return measure_costs(step, speculate, whole, key=key, num_steps=schedule.num_steps)
