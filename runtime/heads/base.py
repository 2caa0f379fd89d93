"""What every head takes and gives: rows of tokens with their conditions, sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cspd.engines.schedule import Schedule
from cspd.runtime.noise import Noise, Purpose


@dataclass(frozen=True)
class HeadSample:
    """Sampled tokens and what is known of their distribution, each [N, C] float32.

    `mean` and `log_std` belong to the last denoising step, which adds no noise (so that `sample` is
    `mean`); `sum_log_std` adds up the steps before it. All without the temperature.
    """

    sample: Tensor
    mean: Tensor
    log_std: Tensor
    sum_log_std: Tensor


@dataclass(frozen=True)
class Rows:
    """Tokens to sample, flattened to N rows: all tensors [N], `conditions` [G, N, D].

    G is 2 with guidance (conditional, then unconditional) and 1 without.
    """

    conditions: Tensor
    guidance: Tensor
    temperature: Tensor
    images: Tensor
    positions: Tensor

    def take(self, index: Tensor) -> Rows:
        """The rows `index`, int64."""
        index = index.to(self.images.device)
        per_row = (self.guidance, self.temperature, self.images, self.positions)
        return Rows(self.conditions.index_select(1, index), *(value[index] for value in per_row))


class Head(Protocol):
    """A way to sample tokens from their conditions."""

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row; `purpose` keys the noise of the chain."""
        ...


def part_of(rows: Rows, start: int, stop: int) -> Rows:
    """Tokens `start` to `stop` of `rows`."""
    part = slice(start, stop)
    return Rows(
        rows.conditions[:, part], rows.guidance[part], rows.temperature[part],
        rows.images[part], rows.positions[part],
    )  # fmt: skip


def concatenate(parts: list[HeadSample]) -> HeadSample:
    """The tokens of all `parts`, in their order."""
    if len(parts) == 1:
        return parts[0]
    names = ("sample", "mean", "log_std", "sum_log_std")
    return HeadSample(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
