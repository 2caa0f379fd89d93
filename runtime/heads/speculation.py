"""Records of speculative denoising: what goes in, how it runs, what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cspd.engines.errors import CspdError
from cspd.engines.words import setting
from cspd.runtime.heads.base import HeadSample


@dataclass(frozen=True)
class SpeculationOptions:
    """At most `window` rows per token and call (1: plain denoising), `candidates` of a residual.

    `max_rows` that the session takes in one call, None for any. `row_buckets` are the row counts
    that calls may have; none means any. With a single bucket every call has exactly one shape, so
    that a token does not depend on the batch that it is in.
    """

    window: int = 8
    candidates: int = 8
    row_buckets: tuple[int, ...] = ()
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.window < 1 or self.candidates < 1:
            raise CspdError(
                f"speculation: window {self.window} and candidates {self.candidates}, expected >= 1"
            )
        sizes = [*self.row_buckets, *([self.max_rows] if self.max_rows is not None else [])]
        if sizes and min(sizes) < self.window:
            raise CspdError(
                f"speculation: a call of {min(sizes)} rows cannot hold the window of {self.window} "
                f"rows of one token; use a smaller {setting('window')} or an engine for more rows"
            )

    @property
    def max_tokens(self) -> int | None:
        """Most tokens that one call can carry; None if any number."""
        limit = max(self.row_buckets) if self.row_buckets else self.max_rows
        return None if limit is None else limit // self.window

    def padded_tokens(self, tokens: int) -> int:
        """Tokens of the call that carries `tokens`."""
        sizes = (rows // self.window for rows in self.row_buckets)
        return min((size for size in sizes if size >= tokens), default=tokens)

    def call_tokens(self, tokens: int) -> int:
        """Tokens of the first call, padding included, when `tokens` are to be sampled."""
        return self.padded_tokens(min(tokens, self.max_tokens or tokens))

    def padded_rows(self, rows: int) -> int:
        """Rows of the call that carries `rows`."""
        return min((size for size in self.row_buckets if size >= rows), default=rows)


@dataclass(frozen=True)
class SpeculationStats:
    """What one batch cost. Steps count tokens: `tested[s]` tokens had a draft tested at step s.

    `rounds` is the number of head calls until the slowest token is done (of the slowest chunk),
    `calls` all head calls, `rows` the evaluated rows with padding, `draws` residual candidates.
    """

    tokens: int
    rounds: int
    calls: int
    rows: int
    draws: int
    tested: np.ndarray = field(repr=False)
    accepted: np.ndarray = field(repr=False)

    def __add__(self, other: SpeculationStats) -> SpeculationStats:
        names = ("tokens", "calls", "rows", "draws", "tested", "accepted")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return SpeculationStats(rounds=max(self.rounds, other.rounds), **sums)


@dataclass(frozen=True)
class SpeculativeSample(HeadSample):
    """Sampled tokens and what they cost."""

    stats: SpeculationStats


class StepLog:
    """Outcomes of the rounds of one batch by token, until `stats` adds them up."""

    def __init__(self, tokens: int, num_steps: int) -> None:
        self.tokens, self.num_steps = tokens, num_steps
        self.rounds = self.rows = 0
        self._outcomes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, step: np.ndarray, moved: np.ndarray, drawn: np.ndarray, rows: int) -> None:
        """One round: per token [N] its first step (-1: finished), steps done, candidates drawn."""
        self._outcomes.append((step, moved, drawn))
        self.rounds += 1
        self.rows += rows

    def stats(self) -> SpeculationStats:
        """Counts over all rounds."""
        step, moved, drawn = (np.concatenate(v) for v in zip(*self._outcomes, strict=True))
        draws = int(drawn[step >= 0].sum())
        step, moved, drawn = (v[(step >= 0) & (moved > 0)] for v in (step, moved, drawn))
        end = step - (moved - 1)
        refused = np.bincount(end[drawn > 0], minlength=self.num_steps)
        # Accepted are the steps above `end` up to `step`: a difference array, summed downwards.
        starts, ends = (np.bincount(v, minlength=self.num_steps) for v in (step, end))
        passed = np.cumsum((starts - ends)[::-1])[::-1]
        return SpeculationStats(
            tokens=self.tokens, rounds=self.rounds, calls=self.rounds, rows=self.rows,
            draws=draws, tested=passed + refused, accepted=passed,
        )  # fmt: skip
