"""The random numbers of speculative denoising chains, each used at most once.

A step is tested at most once and candidates are taken in order, so that tests are numbered by their
step and candidates by how many came before: how far a round speculates changes nothing. Chains that
do not share their noise share no other number either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cspd.runtime.noise import Noise, Purpose

# Purposes of the candidates and of the tests of a chain, by the purpose of its noise.
SPECULATION = {
    Purpose.DENOISE: (Purpose.SPECULATE, Purpose.SPECULATE_TEST),
    Purpose.DENOISE_DRAFT: (Purpose.SPECULATE_DRAFT, Purpose.SPECULATE_TEST_DRAFT),
}


@dataclass(frozen=True)
class ChainNumbers:
    """Numbers of the chains that `purpose` keys, for tokens given by `images`, `positions` [N]."""

    noise: Noise
    purpose: Purpose

    def chain(
        self, images: Tensor, positions: Tensor, num_steps: int, channels: int
    ) -> tuple[Tensor, Tensor]:
        """Start [N, C] and noise [S, N, C] of the chains; step 0, the last, adds none."""
        start, noise = self.noise.chain(self.purpose, images, positions, num_steps, channels)
        noise[0] = 0
        return start, noise

    def tests(self, images: Tensor, positions: Tensor, num_steps: int) -> Tensor:
        """Logarithms of the numbers which drafts are tested with, by step: [S, N]."""
        return self.uniform(images, positions, num_steps).log().T.contiguous()

    def uniform(self, images: Tensor, positions: Tensor, num_steps: int) -> Tensor:
        """Uniform numbers by step [N, S]: a draft passes if its ratio of densities is greater."""
        _, tests = SPECULATION[self.purpose]
        return self.noise.tests(tests, images, positions, num_steps)

    def candidates(
        self, images: Tensor, positions: Tensor, first: Tensor | int, count: int, channels: int
    ) -> tuple[Tensor, Tensor]:
        """`count` candidates from number `first` [N] on: noise [N, K, C] and choices [N, K, 3].

        As rounds take them.
        """
        purpose, _ = SPECULATION[self.purpose]
        normal, choices = self.noise.candidates(purpose, images, positions, first, count, channels)
        choices[..., 1] = -2 * choices[..., 1].log()
        return normal, choices


# How a head gets its numbers; benchmarks replay recorded acceptance with others.
MakeNumbers = Callable[[Noise, Purpose], ChainNumbers]
