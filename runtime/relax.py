"""Deliberately inexact acceptance inside the head, each with the guarantee that it can give.

Lossy: a run that uses one of these says so. They replace the round of `rounds.ReferenceRound`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.engines.session import Session
from cspd.runtime import coupling
from cspd.runtime.coupling import Gaussian
from cspd.runtime.rounds import ReferenceRound, Window, log_accept


@dataclass(frozen=True)
class Relaxation:
    """`kind` "tv": total variation given up per token; "sigma": tolerated standard deviations."""

    kind: str
    amount: float

    def __post_init__(self) -> None:
        limit = {"tv": 1.0, "sigma": math.inf}.get(self.kind)
        if limit is None or not 0 <= self.amount <= limit:
            raise CspdError(
                f"--relax is {self.kind}={self.amount:g}, expected tv=0..1 or sigma=0 or more"
            )

    @classmethod
    def parse(cls, text: str) -> Relaxation:
        """From the words of the command line, such as "tv=0.05" or "sigma=0.5"."""
        kind, _, amount = text.partition("=")
        try:
            return cls(kind, float(amount))
        except ValueError:
            raise CspdError(f"--relax is {text!r}, expected tv=0.05 or sigma=0.5") from None

    @property
    def certificate(self) -> str:
        """What is guaranteed about the samples, for the report of a run."""
        if self.kind == "tv":
            return f"each token's law is within {self.amount:g} of the target's in total variation"
        return (
            f"each kept denoising state is within {self.amount:g} standard deviations of the state "
            "that the target reaches with the same noise; nothing is guaranteed about the law"
        )

    def round(self, denoiser: Session) -> ReferenceRound:
        """The round with this rule."""
        rule = {"tv": TotalVariationRound, "sigma": SameNoiseRound}[self.kind]
        return rule(denoiser, self.amount)


class TotalVariationRound(ReferenceRound):
    """Accepts with probability min(1, p / q + budget / (S - 1)) and repairs exactly.

    Adding b to an acceptance probability and keeping the residual law moves the law of that step by
    at most b in total variation; a step is tested at most once, so that a token's law moves by at
    most `budget`. By the same account no rule with this guarantee saves more than `budget`
    refusals a token, of a dozen: this one is for reports, not for speed.
    """

    def __init__(self, denoiser: Session, budget: float) -> None:
        super().__init__(denoiser)
        self.budget = budget

    def test(self, window: Window, target: Gaussian, t: dict[str, Tensor]) -> Tensor:
        """Which drafts pass, bool [N, L]."""
        ratio = coupling.log_ratio(target, window.kernel, window.reached, window.noise)
        share = self.budget / (len(t["schedule"]) - 1)
        uniform = log_accept(window, t)
        return coupling.accept(uniform, ratio) | (uniform.exp() < ratio.exp() + share)


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
