"""How far to speculate: from measured costs of calls and the share of drafts that pass, by step.

Speculation trades calls for rows. What that is worth depends on the machine (a call of few rows
costs the weights' traffic, a call of many their products), on the model (how long a frozen
prediction stays right) and on how many tokens share a call. The choice changes time,
never the distribution.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from cspd.engines.errors import CspdError
from cspd.engines.spec import Record
from cspd.runtime.heads.drafts import depths_of

WINDOWS = (2, 3, 4, 6, 8, 12, 16)
WHOLE_WINDOWS = (8, 16)  # of which whole chains are measured
PRIOR_WEIGHT = 8.0  # tests that the prior acceptance counts for, per step
SLOW_MS = 2000.0  # a run of this length is measured once
MARGIN = 0.97  # speculation must promise to take less than this share of plain stepping

# Milliseconds, and the mean rows or tokens of a call.
Cost = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CostRecord(Record):
    """Measured milliseconds: `plain` (tokens, whole chain), `rounds` (rows of a call, one round).

    `whole` (window, tokens, whole chain) has what a chain takes that evaluates all rows of every
    window, as reproducible runs do. `num_steps` of the chain; `key` identifies bundle, backend and
    machine (see `cost_key`).
    """

    schema_version: Literal[1] = 1
    key: str
    num_steps: int = Field(ge=1)
    plain: tuple[tuple[Cost, Cost], ...] = Field(min_length=1)
    rounds: tuple[tuple[Cost, Cost], ...] = Field(min_length=1)
    whole: tuple[tuple[Annotated[int, Field(ge=1)], Cost, Cost], ...] = ()

    def chains(self, window: int) -> tuple[tuple[float, float], ...]:
        """Measured (tokens, milliseconds) of whole chains with `window`; empty if none were."""
        return tuple((tokens, spent) for w, tokens, spent in self.whole if w == window)

    def require(self, key: str) -> CostRecord:
        """This record, or a CspdError if it was measured for something else."""
        if self.key != key:
            raise CspdError(
                f"costs were measured for {self.key[:12]}, this is {key[:12]} (another bundle, "
                "backend, machine or version); measure again with: cspd-run tune"
            )
        return self


def cost_key(facts: Mapping[str, str]) -> str:
    """SHA-256 of what a measurement depends on, such as file hashes, backend, CPU and versions."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def measure_costs(
    plain: Callable[[int], float], rounds: Callable[[int, int], tuple[float, float]],
    whole: Callable[[int, int], float], *, key: str, num_steps: int,
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32), windows: tuple[int, ...] = (4, 16),
    repeats: int = 5,
) -> CostRecord:  # fmt: skip
    """Measure both ways end to end, noise and host included; the least of `repeats` runs counts.

    `plain(tokens)` steps through a chain and returns its milliseconds; `rounds(tokens, window)`
    speculates and returns (mean rows per call, milliseconds per round); `whole(tokens, window)`
    speculates with all rows of its windows and returns the milliseconds of the chain. The first
    pass over everything warms up and counts only where it took long; the passes spread a load that
    comes and goes over all sizes.
    """
    chains: dict[int, float] = {}
    calls: dict[tuple[int, int], tuple[float, float]] = {}
    wholes: dict[tuple[int, int], float] = {}
    for repeat in range(repeats + 1):
        for count in tokens:
            if repeat == 0 or chains[count] < SLOW_MS:
                chains[count] = _least(plain(count), chains.get(count), repeat)
            for window in windows:
                known = calls.get((count, window))
                if known is None or known[1] * num_steps / window < SLOW_MS:
                    size, spent = rounds(count, window)
                    calls[count, window] = size, _least(spent, known and known[1], repeat)
            for window in WHOLE_WINDOWS:
                before = wholes.get((window, count))
                if before is None or before < SLOW_MS:
                    wholes[window, count] = _least(whole(count, window), before, repeat)
    return CostRecord(
        key=key,
        num_steps=num_steps,
        plain=tuple((float(count), spent) for count, spent in chains.items()),
        rounds=tuple(sorted(calls.values())),
        whole=tuple((window, float(count), ms) for (window, count), ms in wholes.items()),
    )


def _least(spent: float, known: float | None, repeat: int) -> float:
    """The least so far; what the first pass took is forgotten unless it is all there is."""
    return spent if known is None or repeat <= 1 else min(spent, known)


def cost_at(points: tuple[tuple[float, float], ...], size: np.ndarray | float) -> np.ndarray:
    """Cost at `size`: a non-decreasing, piecewise linear curve below `points`, extrapolated.

    Below, because other load only ever adds to a measurement.
    """
    sizes, costs = np.array(points).T
    costs = np.minimum.accumulate(costs[::-1])[::-1]
    slope = (costs[-1] - costs[0]) / max(sizes[-1] - sizes[0], 1e-9)
    return np.interp(size, sizes, costs) + slope * np.maximum(np.asarray(size) - sizes[-1], 0)


def arrivals(acceptance: np.ndarray, window: int) -> np.ndarray:
    """Probability [S, window] that row j of a window that starts at step s is reached."""
    step = np.arange(len(acceptance))[:, None] - np.arange(window - 1)
    passes = np.where(step > 0, acceptance[step.clip(min=0)], 0.0)
    return np.concatenate([np.ones((len(acceptance), 1)), passes.cumprod(1)], axis=1)


def predict(
    acceptance: np.ndarray, window: int, tokens: int, cost: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Expected milliseconds until all of `tokens` independent tokens are done.

    A Markov chain over steps: a round that starts at s ends at row j with the probability of
    reaching j and failing there, and always at its last row. `cost(rows)` is that of one round.
    """
    num_steps = len(acceptance)
    depth = depths_of(window, num_steps)
    arrival = arrivals(acceptance, window) * (np.arange(window) < depth[:, None])
    ends = arrival - np.concatenate([arrival[:, 1:], np.zeros((num_steps, 1))], axis=1)
    moves = np.zeros((num_steps, num_steps))
    start, row = np.nonzero(ends[:, :num_steps])
    stays = start - row - 1 >= 0
    moves[start[stays], start[stays] - row[stays] - 1] = ends[start[stays], row[stays]]
    where, total = np.zeros(num_steps), 0.0
    where[-1] = 1.0
    for _ in range(num_steps):
        busy = 1 - (1 - min(where.sum(), 1.0)) ** tokens
        if busy < 1e-6:
            break
        total += busy * float(cost(tokens * (where @ depth) / busy))
        where = where @ moves
    return total


@dataclass(frozen=True)
class Forecast:
    """What ways to sample should take, from measured `costs`.

    `acceptance` [S] is the share of drafts that pass at each step.
    """

    costs: CostRecord
    acceptance: np.ndarray

    def plain(self, tokens: int) -> float:
        """Milliseconds of stepping through the chains of `tokens` tokens together."""
        return float(cost_at(self.costs.plain, tokens))

    def speculative(self, tokens: int, window: int, *, fixed: bool) -> float:
        """Milliseconds of speculating for `tokens` tokens together: measured, else predicted.

        `fixed`: every round evaluates all rows of its window, as reproducible runs do.
        """
        chains = self.costs.chains(window)
        if fixed and chains:
            return float(cost_at(chains, tokens))

        def cost(rows: np.ndarray) -> np.ndarray:
            return cost_at(self.costs.rounds, tokens * window if fixed else rows)

        return predict(self.acceptance, window, tokens, cost)

    def windows(self, *, fixed: bool) -> tuple[int, ...]:
        """Windows to choose from; those that were measured whole, if rounds are `fixed`."""
        measured = tuple(window for window in WINDOWS if self.costs.chains(window))
        return measured if fixed and measured else WINDOWS
