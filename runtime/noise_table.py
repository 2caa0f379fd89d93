"""The random numbers of a batch, drawn in one pass and looked up: for a GPU.

The generator is some hundred small operations. On a GPU each is a launch, whatever its size: the
numbers of all tokens of an image cost as much as those of one. They are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cspd.runtime.noise import Noise, Purpose

IMAGES_AT_ONCE = 8  # of a pass: what is computed with is eight times what is kept


class TabledNoise(Noise):
    """The numbers of `noise` for `images` [B] of `num_tokens` tokens; others are passed on."""

    def __init__(self, noise: Noise, images: Tensor, num_tokens: int) -> None:
        super().__init__(noise.seed, noise.device)
        self._noise, self._images, self._num_tokens = noise, images, num_tokens
        self._chains: dict[tuple[Purpose, int], Tensor] = {}
        self._tests: dict[Purpose, Tensor] = {}
        self._candidates: dict[tuple[Purpose, int, int], tuple[Tensor, Tensor]] = {}
        # The tokens that were asked for last, and where they lie.
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def chain(
        self, purpose: Purpose, images: Tensor, positions: Tensor, num_steps: int, channels: int
    ) -> tuple[Tensor, Tensor]:
        """See `Noise.chain`; a chain of fewer steps has the same numbers."""
        table = self._chains.get((purpose, channels))
        if table is None or len(table) <= num_steps:
            table = self._pieces(
                lambda i, p: torch.cat(
                    _joined(self._noise.chain(purpose, i, p, num_steps, channels))
                ),
                dim=1,
            )
            self._chains[purpose, channels] = table
        taken = table[: num_steps + 1].index_select(1, self._rows(images, positions))
        return taken[num_steps], taken[:num_steps]

    def tests(self, purpose: Purpose, images: Tensor, positions: Tensor, count: int) -> Tensor:
        """See `Noise.tests`."""
        table = self._tests.get(purpose)
        if table is None or table.shape[1] < count:
            table = self._pieces(lambda i, p: self._noise.tests(purpose, i, p, count), dim=0)
            self._tests[purpose] = table
        return table[:, :count].index_select(0, self._rows(images, positions))

    def candidates(
        self, purpose: Purpose, images: Tensor, positions: Tensor, first: Tensor | int, count: int,
        channels: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `Noise.candidates`; the first ones are looked up."""
        if not (isinstance(first, int) and first == 0):
            return self._noise.candidates(purpose, images, positions, first, count, channels)
        key = purpose, count, channels
        if key not in self._candidates:

            def draw(i: Tensor, p: Tensor) -> Tensor:
                return torch.cat(self._noise.candidates(purpose, i, p, 0, count, channels), dim=-1)

            table = self._pieces(draw, dim=0)
            self._candidates[key] = table[..., :channels], table[..., channels:]
        rows = self._rows(images, positions)
        normal, uniform = (part.index_select(0, rows) for part in self._candidates[key])
        return normal, uniform

    def _rows(self, images: Tensor, positions: Tensor) -> Tensor:
        """Where the numbers of tokens lie in the tables, [R]."""
        if self._last is None or self._last[0] is not images or self._last[1] is not positions:
            image = (images[:, None] == self._images).int().argmax(1)
            self._last = images, positions, image * self._num_tokens + positions
        return self._last[2]

    def _pieces(self, draw: Callable[[Tensor, Tensor], Tensor], dim: int) -> Tensor:
        """`draw` for every token of every image, some images at once, joined along `dim`."""
        positions = torch.arange(self._num_tokens, device=self.device)
        parts = []
        for images in self._images.split(IMAGES_AT_ONCE):
            every = images.repeat_interleave(self._num_tokens)
            parts.append(draw(every, positions.repeat(len(images))))
        return torch.cat(parts, dim=dim)

    def _words(
        self, purpose: Purpose, images: Tensor, positions: Tensor, steps: Tensor, blocks: int
    ) -> Tensor:
        return self._noise._words(purpose, images, positions, steps, blocks)


def _joined(chain: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Start and noise of chains as one table by step, the start last."""
    start, noise = chain
    return [noise, start[None]]
