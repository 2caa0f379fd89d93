"""Speculation inside the head with borrowed acceptance: timing of heads without trained weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cspd.runtime.heads.numbers import ChainNumbers

CERTAIN = 1e20


@dataclass(frozen=True)
class ReplayNumbers(ChainNumbers):
    """Numbers that accept with given probabilities by step, whatever the network says.

    With them the graphs compute all that they do otherwise. A refused draft takes its first
    candidate: those of random weights would be refused for ever.
    """

    acceptance: Tensor

    def tests(self, images: Tensor, positions: Tensor, num_steps: int) -> Tensor:
        """Numbers that every draft passes, or none does: [S, N]."""
        drawn = super().tests(images, positions, num_steps)
        return torch.where(drawn < self.acceptance.log()[:, None], -CERTAIN, CERTAIN)

    def candidates(
        self, images: Tensor, positions: Tensor, first: Tensor | int, count: int, channels: int
    ) -> tuple[Tensor, Tensor]:
        """Candidates that are all kept."""
        noise, choices = super().candidates(images, positions, first, count, channels)
        choices[..., 2] = -CERTAIN
        return noise, choices
