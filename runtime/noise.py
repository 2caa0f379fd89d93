"""Random numbers as a pure function of (seed, image, position, step, purpose).

A counter-based generator (Philox 4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") instead of a stream: the number for one token does not depend on the batch it is drawn in,
on the order of the work, or on what was drawn before.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes are independent."""

    ORDER = 0
    DENOISE = 1  # noise of the sampling chain, shared by draft and target when they are aligned
    DENOISE_DRAFT = 2  # the draft's own noise when they are not
    ACCEPT = 3
    RESAMPLE = 4
    RESAMPLE_ACCEPT = 5
    # Speculative denoising: candidates of the residual distribution, keyed by their number within
    # a token; the tests of drafts, one number per step; what chains with noise of their own take.
    SPECULATE = 6
    SPECULATE_TEST = 7
    SPECULATE_DRAFT = 8
    SPECULATE_TEST_DRAFT = 9


class Noise:
    """Source of all random numbers of one run.

    Index tensors (`images`, `positions`, `steps`) are int64 of one common shape, or broadcast to
    it; images in 0..2^32-1, positions in 0..2^16-1, steps and tries in 0..2^16-1.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.device = seed, torch.device(device)

    def normal(
        self, purpose: Purpose, images: Tensor, positions: Tensor, steps: Tensor, channels: int
    ) -> Tensor:
        """Standard normal numbers [..., channels] float32 for index tensors [...]."""
        words = self._words(purpose, images, positions, steps, -(-channels // 4))
        return to_normal(words)[..., :channels]

    def uniform(
        self, purpose: Purpose, images: Tensor, positions: Tensor, steps: Tensor, count: int = 1
    ) -> Tensor:
        """Uniform numbers [..., count] float32 in (0, 1), both ends excluded."""
        words = self._words(purpose, images, positions, steps, -(-count // 4))
        return to_uniform(words[..., :count])

    def normal_and_uniform(
        self, purpose: Purpose, images: Tensor, positions: Tensor, steps: Tensor, channels: int,
        count: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Normal numbers [..., channels] and uniform ones [..., count], none used twice."""
        blocks = -(-channels // 4)
        words = self._words(purpose, images, positions, steps, blocks + -(-count // 4))
        normal, uniform = words[..., : 4 * blocks], words[..., 4 * blocks :]
        return to_normal(normal)[..., :channels], to_uniform(uniform[..., :count])

    def chain(
        self, purpose: Purpose, images: Tensor, positions: Tensor, num_steps: int, channels: int
    ) -> tuple[Tensor, Tensor]:
        """Noise of whole denoising chains: start [R, C] and steps [S, R, C] for indices [R]."""
        steps = torch.arange(num_steps + 1, device=self.device)[:, None]
        noise = self.normal(purpose, images[None], positions[None], steps, channels)
        return noise[num_steps], noise[:num_steps]

    def tests(self, purpose: Purpose, images: Tensor, positions: Tensor, count: int) -> Tensor:
        """The uniform numbers [R, count] of step 0 for indices [R]."""
        return self.uniform(purpose, images, positions, torch.zeros_like(images), count)

    def candidates(
        self, purpose: Purpose, images: Tensor, positions: Tensor, first: Tensor | int, count: int,
        channels: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Normal [R, K, C] and uniform [R, K, 3] numbers of K = `count` steps from `first` on."""
        first = torch.as_tensor(first, device=images.device).expand(len(images))
        keys = first[:, None] + torch.arange(count, device=images.device)
        where = images[:, None], positions[:, None], keys
        return self.normal_and_uniform(purpose, *where, channels, 3)

    def orders(self, images: Tensor, num_tokens: int) -> Tensor:
        """Random orders of generation [B, L] int64: token positions, first generated first."""
        positions = torch.arange(num_tokens, device=self.device)
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        keys = self._words(Purpose.ORDER, images[:, None], positions, zero, 1)
        return (keys[..., 0] * 2**16 + (keys[..., 1] >> 16)).argsort(dim=1, stable=True)

    def _words(
        self, purpose: Purpose, images: Tensor, positions: Tensor, steps: Tensor, blocks: int
    ) -> Tensor:
        """Random 32-bit words [..., 4 * blocks] as int64."""
        position = (positions + (int(purpose) << 16))[..., None]
        block = torch.arange(blocks, device=self.device)
        counter = torch.broadcast_tensors(images[..., None], position, steps[..., None], block)
        return _philox(counter, (self.seed & _WORD, self.seed >> 32 & _WORD)).flatten(-2)


class RowNoise(Noise):
    """Noise of a batch whose rows belong to different runs.

    What `Noise` calls images are rows of the batch here: row r gets exactly the numbers of image
    `images[r]` of seed `seeds[r]`.
    """

    def __init__(
        self, seeds: list[int], images: list[int], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(0, device)
        words = [
            (seed & _WORD, seed >> 32 & _WORD, k) for seed, k in zip(seeds, images, strict=True)
        ]
        self._rows = torch.tensor(words, device=self.device)

    def _words(
        self, purpose: Purpose, images: Tensor, positions: Tensor, steps: Tensor, blocks: int
    ) -> Tensor:
        low, high, image = self._rows[images].unbind(-1)
        position = (positions + (int(purpose) << 16))[..., None]
        block = torch.arange(blocks, device=self.device)
        counter = torch.broadcast_tensors(image[..., None], position, steps[..., None], block)
        return _philox(counter, (low[..., None], high[..., None])).flatten(-2)


def to_normal(words: Tensor) -> Tensor:
    """Normal numbers float32, all finite, from 32-bit words [..., 2 K], by Box-Muller on pairs."""
    # The radius comes from a number in (0, 1).
    radius = (-2 * ((words[..., 0::2].double() + 0.5) / 2**32).log()).sqrt()
    angle = words[..., 1::2].double() * (2 * math.pi / 2**32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1).float()


def to_uniform(words: Tensor) -> Tensor:
    """Uniform numbers float32 in (0, 1), both ends excluded, from 32-bit words."""
    # 23 bits and a half: exact in float32, so that neither 0 nor 1 can come from rounding.
    return ((words >> 9).double() + 0.5).mul(2.0**-23).float()


def _philox(
    counter: tuple[Tensor, ...] | list[Tensor], key: tuple[int | Tensor, int | Tensor]
) -> Tensor:
    """Philox 4x32-10 on four int64 tensors of 32-bit words; returns [..., 4].

    On the CPU in NumPy, whose hundred small operations cost a third of those of PyTorch.
    """
    if counter[0].device.type != "cpu":
        return torch.stack(_rounds(*counter, *key), dim=-1)
    values: list[Any] = [
        value if isinstance(value, int) else value.numpy().astype(np.uint64)
        for value in (*counter, *key)
    ]
    words = np.broadcast_arrays(*_rounds(*values))
    return torch.from_numpy(np.stack(words, axis=-1).view(np.int64))


def _rounds(*words: Any) -> list[Any]:
    """The ten rounds on four counter words and two of the key, in 64 bits, signed or not."""
    c0, c1, c2, c3, k0, k1 = words
    for _ in range(_ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # A signed product wraps; shift and mask recover its upper word all the same.
        c0, c1 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD
        c2, c3 = (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]
