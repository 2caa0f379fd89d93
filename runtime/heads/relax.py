"""Deliberately inexact acceptance inside the head, with the guarantee that it can give.

Lossy: a run that uses it says so. It tests with other numbers, in the same graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cspd.engines.errors import SettingError
from cspd.engines.words import setting
from cspd.runtime.heads.numbers import ChainNumbers


def total_variation(text: str) -> float:
    """What "tv=0.05" gives up per token: 0.05, a total variation of 0..1."""
    kind, _, amount = text.partition("=")
    try:
        given_up = float(amount)
    except ValueError:
        given_up = -1.0
    if kind != "tv" or not 0 <= given_up <= 1:
        raise SettingError(f"{setting('relax')} is {text!r:.60}, expected tv=0..1, such as tv=0.05")
    return given_up


@dataclass(frozen=True)
class LenientNumbers(ChainNumbers):
    """Numbers u - b instead of u, so that drafts pass with probability min(1, p / q + b).

    b is `budget` / (S - 1); residuals stay exact. Adding b to an acceptance probability and keeping
    the residual moves the distribution of that step by at most b in total variation; a step is
    tested at most once, so that a token's moves by at most `budget`. By the same account no rule
    with this guarantee saves more than `budget` refusals a token, of a dozen: this one is for
    reports, not for speed.
    """

    budget: float = 0.0

    def uniform(self, images: Tensor, positions: Tensor, num_steps: int) -> Tensor:
        """Uniform numbers less what is given up; positive, so that they have logarithms."""
        exact = super().uniform(images, positions, num_steps)
        return (exact - self.budget / (num_steps - 1)).clamp(min=torch.finfo(exact.dtype).tiny)
