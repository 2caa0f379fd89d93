"""Which tokens each autoregressive step generates, and with how much guidance."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from cspd.engines.errors import CspdError
from cspd.engines.words import setting


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

    @property
    def widest(self) -> int:
        """Largest number of tokens that one step generates."""
        return max(b - a for a, b in zip((0, *self.boundaries), self.boundaries, strict=False))
