"""Fewer denoising steps on purpose: "50:20" anneals their number over the autoregressive steps.

Late tokens are conditioned on most of the image and need fewer steps. Another number of steps than
the model's own draws from another distribution: lossy, and reported as that (DiSA, arXiv
2505.20297).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cspd.engines.schedule import Schedule
from cspd.runtime.heads.base import Head, HeadSample, Rows
from cspd.runtime.noise import Noise, Purpose


@dataclass(frozen=True)
class HeadSteps:
    """Denoising steps of the first and of the last autoregressive step, linear in between."""

    first: int
    last: int

    @classmethod
    def parse(cls, value: object) -> HeadSteps:
        """From 100, "100" or "50:20"; ValueError says what is expected."""
        parts = str(value).split(":")
        if isinstance(value, bool) or not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError("expected a number such as 100, or two such as 50:20")
        numbers = [int(part[:9]) for part in parts]
        if len(numbers) > 2 or min(numbers) < 2:
            raise ValueError("expected 2 or more steps, or two such numbers: 50:20")
        return cls(numbers[0], numbers[-1])

    @property
    def constant(self) -> bool:
        """Whether every autoregressive step has the same number."""
        return self.first == self.last

    @property
    def value(self) -> int | str:
        """The shortest way to write it."""
        return self.first if self.constant else f"{self.first}:{self.last}"

    def at(self, index: int, count: int) -> int:
        """Denoising steps of autoregressive step `index` of `count`."""
        left = (count - 1 - index) / (count - 1) if count > 1 else 1.0
        return self.last + int(left * (self.first - self.last))


@dataclass(frozen=True)
class Annealing:
    """Schedules by their number of steps; with `whole`, a head call never depends on the mixture.

    Tokens of one call may need different numbers of steps. Each number is a call for its tokens;
    `whole` makes it a call for all of them, where shapes must not depend on how they mix.
    """

    steps: HeadSteps
    schedules: Mapping[int, Schedule]

    def sample(
        self, head: Head, rows: Rows, counts: Tensor, noise: Noise, purpose: Purpose,
        *, whole: bool,
    ) -> HeadSample:  # fmt: skip
        """Sample every row with its number of steps, `counts` [N] on the host."""
        values = counts.unique().tolist()
        everything = torch.arange(len(counts))
        results: HeadSample | None = None
        for value in values:
            wanted = (counts == value).nonzero()[:, 0]
            taken = everything if whole else wanted
            out = head(rows.take(taken), self.schedules[value], noise, purpose)
            if len(values) == 1:
                return out
            results = _place(results, out, len(counts), wanted, wanted if whole else None)
        assert results is not None
        return results


def _place(
    results: HeadSample | None, out: HeadSample, count: int, to: Tensor, source: Tensor | None
) -> HeadSample:
    """`results`, or empty ones, with rows `source` (all if None) of `out` written to rows `to`."""
    parts = {name: getattr(out, name) for name in HeadSample.__dataclass_fields__}
    if results is None:
        results = HeadSample(**{n: p.new_empty(count, p.shape[1]) for n, p in parts.items()})
    for name, part in parts.items():
        whole = getattr(results, name)
        whole[to.to(whole.device)] = part if source is None else part[source.to(part.device)]
    return results
