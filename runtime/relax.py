"""Deliberately inexact acceptance inside the head, each with the guarantee that it can give.

Lossy: a run that uses one of these says so. "tv" tests with other numbers, in the same graphs;
"sigma" has a test of its own, in a round that replaces `rounds.ReferenceRound`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cspd.engines.errors import SettingError
from cspd.engines.session import Session
from cspd.engines.words import setting
from cspd.runtime.chain_numbers import ChainNumbers, MakeNumbers
from cspd.runtime.coupling import Gaussian
from cspd.runtime.rounds import ReferenceRound, Window


@dataclass(frozen=True)
class Relaxation:
    """`kind` "tv": total variation given up per token; "sigma": tolerated standard deviations."""

    kind: str
    amount: float

    def __post_init__(self) -> None:
        limit = {"tv": 1.0, "sigma": math.inf}.get(self.kind)
        if limit is None or not 0 <= self.amount <= limit:
            raise SettingError(
                f"{setting('relax')} is {self.kind}={self.amount:g}, expected tv=0..1 "
                "or sigma=0 or more"
            )

    @classmethod
    def parse(cls, text: str) -> Relaxation:
        """From the words of the command line, such as "tv=0.05" or "sigma=0.5"."""
        kind, _, amount = text.partition("=")
        try:
            return cls(kind, float(amount))
        except ValueError:
            raise SettingError(
                f"{setting('relax')} is {text!r}, expected tv=0.05 or sigma=0.5"
            ) from None

    @property
    def certificate(self) -> str:
        """What is guaranteed about the samples, for the report of a run."""
        if self.kind == "tv":
            return f"each token is within {self.amount:g} of the target's in total variation"
        return (
            f"each kept denoising state is within {self.amount:g} standard deviations of the state "
            "that the target reaches with the same noise; the distribution is not guaranteed"
        )

    @property
    def numbers(self) -> MakeNumbers:
        """What the chains of "tv" are tested with."""
        return partial(LenientNumbers, budget=self.amount)


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


class SameNoiseRound(ReferenceRound):
    """Keeps a draft that is close to where the same noise leads the target, else takes that state.

    Close: within `tolerance` of the target's standard deviations, in the norm over all channels.
    Deterministic given the noise; tolerance 0 is plain stepping. (ParaDiGMS, Shih et al. 2023.)
    """

    def __init__(self, denoiser: Session, tolerance: float) -> None:
        super().__init__(denoiser)
        self.tolerance = tolerance

    def test(self, window: Window, target: Gaussian, t: dict[str, Tensor]) -> Tensor:
        """Which drafts pass, bool [N, L]."""
        distance = (window.reached - target.at(window.noise)) / target.std
        return distance.norm(dim=-1) <= self.tolerance

    def repair(
        self, target: Gaussian, drafted: Gaussian, drawn: Tensor, t: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The target's own state with the same noise."""
        return drawn, drawn.new_zeros(len(drawn)).int()
