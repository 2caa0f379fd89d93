"""Rounds of speculation end: a graph that makes no headway is refused, not waited for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cspd.engines.errors import BundleError

# Candidates of one token in a whole chain: a step takes four on average at the very worst, which
# leaves a correct graph no chance to need more.
MOST_DRAWN, MOST_DRAWN_PER_STEP = 1000, 16


class Counts(NamedTuple):
    """What a call did to each of its N tokens.

    `step` [N] before and `after` it, negative for finished tokens; steps `moved` and candidates
    `drawn`, [N], or [N, P] by round; `used` [N], all candidates of the chain, these included.
    """

    step: np.ndarray
    after: np.ndarray
    moved: np.ndarray
    drawn: np.ndarray
    used: np.ndarray


def check_progress(counts: Counts, candidates: int, num_steps: int) -> None:
    """Raise BundleError unless every token came nearer to its end, within what a chain can need.

    A token that is not finished moves, or draws some of the `candidates` of the call; what it moved
    is what its step says. A call that only draws is fine: none of its candidates was kept.
    """
    step, after, used = counts.step, counts.after, counts.used
    moved, drawn = (_per_token(value) for value in (counts.moved, counts.drawn))
    right = np.where(
        step >= 0,
        (moved >= 0) & (after >= -1) & (after == step - moved) & (moved + drawn > 0),
        (after < 0) & (drawn == 0),
    )
    right &= (drawn >= 0) & (drawn <= candidates)
    right &= used <= MOST_DRAWN + MOST_DRAWN_PER_STEP * num_steps
    if not right.all():
        first = int(np.flatnonzero(~right)[0])
        raise BundleError(
            f"speculation: a token at step {step[first]} is at {after[first]} after a call that "
            f"moved it by {moved[first]} and drew {drawn[first]} of {candidates} candidates, "
            f"{used[first]} in all of {num_steps} steps: the graph of this model never comes to "
            "an end; rebuild the bundle with cspd-export build"
        )


def _per_token(value: np.ndarray) -> np.ndarray:
    """Sums [N] over the rounds of a call; negative where one of them is."""
    if value.ndim == 1:
        return value
    return np.where((value < 0).any(1), -1, value.sum(1))
