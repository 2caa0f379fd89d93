"""Which tokens each autoregressive step and each window of drafts generates, and its guidance."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.engines.words import setting
from cspd.runtime.noise import Noise


class Plan(Protocol):
    """Which tokens an image's steps generate, of any family; see `MaskPlan` for the words."""

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        ...

    @property
    def num_iter(self) -> int:
        """Autoregressive steps of an image."""
        ...

    @property
    def cfg(self) -> float:
        """Guidance scale; 1 means none."""
        ...

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Number of known tokens after each step, ascending."""
        ...

    @property
    def widest(self) -> int:
        """Largest number of tokens that one step generates."""
        ...

    def stop(self, known: int) -> int:
        """Number of known tokens after the step that starts with `known` of them."""
        ...

    def index(self, known: int) -> int:
        """Number, from 0, of the step that starts with `known` of them."""
        ...

    def guidance(self, known: int) -> float:
        """Guidance scale of the step that starts with `known` tokens."""
        ...

    def sequence(self, images: Tensor, noise: Noise) -> Tensor:
        """Positions [B, L] int32 of the tokens of `images` [B] in the order they are generated."""
        ...


@dataclass(frozen=True)
class RasterPlan:
    """Row by row, `width` tokens a step, for models whose order is fixed."""

    num_tokens: int
    width: int = 1
    cfg: float = 1.0

    @property
    def num_iter(self) -> int:
        """Autoregressive steps of an image."""
        return len(self.boundaries)

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Number of known tokens after each step, ascending; the last is `num_tokens`."""
        return (*range(self.width, self.num_tokens, self.width), self.num_tokens)

    @property
    def widest(self) -> int:
        """Largest number of tokens that one step generates."""
        return min(self.width, self.num_tokens)

    def stop(self, known: int) -> int:
        """Number of known tokens after the step that starts with `known` of them."""
        return self.boundaries[self.index(known)]

    def index(self, known: int) -> int:
        """Number, from 0, of the step that starts with `known` of them."""
        return bisect_right(self.boundaries, known)

    def guidance(self, known: int) -> float:
        """Guidance scale of the step that starts with `known` tokens."""
        return self.cfg

    def sequence(self, images: Tensor, noise: Noise) -> Tensor:
        """Positions [B, L] int32: the same for all, row by row."""
        order = torch.arange(self.num_tokens, dtype=torch.int32, device=images.device)
        return order.repeat(len(images), 1)


@dataclass(frozen=True)
class MaskPlan:
    """The cosine mask schedule of MAR over `num_iter` steps for `num_tokens` tokens.

    A step is identified by the number of tokens known before it, so that samples of one batch can
    be at different steps. (MAR, sample_tokens.)
    """

    num_tokens: int
    num_iter: int
    cfg: float = 1.0
    cfg_schedule: str = "constant"

    def __post_init__(self) -> None:
        if not 1 <= self.num_iter <= self.num_tokens:
            raise CspdError(
                f"{setting('num_iter')} is {self.num_iter}, expected 1..{self.num_tokens}, "
                "the number of tokens of an image"
            )

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Number of known tokens after each step, ascending; the last is `num_tokens`."""
        masked, known = self.num_tokens, []
        for step in range(1, self.num_iter):
            ratio = math.cos(math.pi / 2 * step / self.num_iter)
            masked = max(1, min(masked - 1, math.floor(self.num_tokens * ratio)))
            known.append(self.num_tokens - masked)
        return (*known, self.num_tokens)

    def stop(self, known: int) -> int:
        """Number of known tokens after the step that starts with `known` of them."""
        return self.boundaries[self.index(known)]

    def index(self, known: int) -> int:
        """Number, from 0, of the step that starts with `known` of them."""
        return bisect_right(self.boundaries, known)

    def guidance(self, known: int) -> float:
        """Guidance scale of the step that starts with `known` tokens."""
        if self.cfg_schedule == "constant":
            return self.cfg
        # The authors never count the last token as generated here, not even in the last step.
        after = min(self.stop(known), self.num_tokens - 1)
        return 1 + (self.cfg - 1) * after / self.num_tokens

    def sequence(self, images: Tensor, noise: Noise) -> Tensor:
        """Positions [B, L] int32 of the tokens in the random order of every image."""
        return noise.orders(images, self.num_tokens).int()

    @property
    def widest(self) -> int:
        """Largest number of tokens that one step generates."""
        return max(b - a for a, b in zip((0, *self.boundaries), self.boundaries, strict=False))


@dataclass(frozen=True)
class WindowPlan:
    """Where the windows of `cspd` end: each begins with the tokens known so far.

    `gamma` and `prefill` count tokens: a window is the least number of steps that bring `gamma`
    new tokens. With `in_steps` they count autoregressive steps as the released runner does, which
    verifies after the steps 0, `gamma`, 2 `gamma`, ... of the image and after its last.
    """

    plan: Plan
    gamma: int
    prefill: float
    in_steps: bool = False

    @property
    def first(self) -> int:
        """Tokens that the target generates before the first window."""
        if self.in_steps:
            steps = math.ceil(self.prefill * self.plan.num_iter)
            return (0, *self.plan.boundaries)[steps]
        wanted = math.floor(self.prefill * self.plan.num_tokens)
        return next(known for known in (0, *self.plan.boundaries) if known >= wanted)

    def stop(self, known: int) -> int:
        """Number of known tokens after the window that starts with `known` of them."""
        if known >= self.plan.num_tokens:
            return known
        if self.in_steps:
            last = -(-self.plan.index(known) // self.gamma) * self.gamma
            return self.plan.boundaries[min(last, self.plan.num_iter - 1)]
        goal = min(known + self.gamma, self.plan.num_tokens)
        return next(end for end in self.plan.boundaries if end >= goal)

    @cached_property
    def widest(self) -> int:
        """A number of tokens that no window exceeds, wherever it starts."""
        if self.in_steps:
            return max(self.stop(known) - known for known in range(self.plan.num_tokens))
        return min(self.gamma - 1 + self.plan.widest, self.plan.num_tokens)

    @property
    def widths(self) -> list[int]:
        """Tokens of every window, if each is kept whole."""
        ends = [self.first]
        while ends[-1] < self.plan.num_tokens:
            ends.append(self.stop(ends[-1]))
        return [end - start for start, end in pairwise(ends)]

    @property
    def target_rounds(self) -> int:
        """Steps of the target, then verifications, if every window is kept whole."""
        return sum(end <= self.first for end in self.plan.boundaries) + len(self.widths)
