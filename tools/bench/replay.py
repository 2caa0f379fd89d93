"""Speculative decoding with borrowed acceptance: speed figures of models without weights.

Random weights accept next to nothing, so that their timing says nothing about trained ones. Here
every verdict is drawn with the probability that another pair of models was measured to have at the
same share of known tokens; all networks and all acceptance arithmetic run as usual.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from cspd.engines.errors import CspdError
from cspd.engines.spec import Record
from cspd.runtime.config import RunConfig
from cspd.runtime.decode.canvas import Batch, Canvas
from cspd.runtime.decode.cspd import Speculative
from cspd.runtime.decode.decoder import Decoder
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.decode.window import Window
from cspd.runtime.heads.base import HeadSample
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.pipeline import Pipeline
from cspd.tools.bench.results import Results
from cspd.tools.bench.tables import acceptance_by_known

VERDICT_STEP = 1  # index of the random numbers used here; those of real verdicts have 0
CERTAIN = 1e6  # nats per channel by which a forced rejection fails the test


class AcceptancePattern(Record):
    """Measured acceptance by share of known tokens: `shares` ascending, `rates` in 0..1."""

    source: str
    shares: tuple[float, ...]
    rates: tuple[float, ...]

    def rate(self, share: float) -> float:
        """Acceptance at the nearest measured share."""
        nearest = min(range(len(self.shares)), key=lambda i: abs(self.shares[i] - share))
        return self.rates[nearest]

    def force(
        self, window: Window, judged: HeadSample, batch: Batch, noise: Noise, length: int
    ) -> HeadSample:
        """The target's samples, changed so that the test ends as the pattern says."""
        positions = window.span.positions.long()
        images = batch.images[:, None].expand_as(positions)
        step = torch.full((), VERDICT_STEP, dtype=torch.int64, device=positions.device)
        uniform = noise.uniform(Purpose.ACCEPT, images, positions, step)[..., 0]
        rates = [self.rate(known / length) for known in window.span.start]
        wanted = (uniform < torch.tensor(rates, device=uniform.device)[:, None])[..., None]
        refused = replace(judged, sum_log_std=window.drafted.sum_log_std + CERTAIN)
        fields = ("sample", "mean", "log_std", "sum_log_std")
        return HeadSample(*(
            torch.where(wanted, getattr(window.drafted, name), getattr(refused, name))
            for name in fields
        ))  # fmt: skip


def load_pattern(results: Results) -> AcceptancePattern:
    """The pattern that a benchmark of trained models measured."""
    counts = {known: c for known, c in acceptance_by_known(results).items() if c[1]}
    if results.header["synthetic"] or not counts:
        raise CspdError(
            "--replay-acceptance: needs the finished benchmark of a bundle with trained weights"
        )
    length = results.header["num_tokens"]
    return AcceptancePattern(
        source=results.header["bundle"],
        shares=tuple(known / length for known in counts),
        rates=tuple(accepted / judged for accepted, judged in counts.values()),
    )


@dataclass(frozen=True)
class Replayed(Speculative):
    """Speculative decoding whose verdicts follow `pattern`."""

    pattern: AcceptancePattern

    def verify(self, batch: Batch, canvas: Canvas, window: Window) -> HeadSample:
        """The target's samples of the tokens in `window`, changed as the pattern says."""
        judged = super().verify(batch, canvas, window)
        length = self.sampler.plan.num_tokens
        return self.pattern.force(window, judged, batch, self.sampler.noise, length)


@dataclass
class ReplayPipeline(Pipeline):
    """A pipeline whose verdicts follow `pattern`."""

    pattern: AcceptancePattern | None = None

    def decoder(self, config: RunConfig, sampler: Sampler | None = None) -> Decoder:
        """The method of `config`; cspd with borrowed acceptance."""
        usual = super().decoder(config, sampler)
        if not isinstance(usual, Speculative) or self.pattern is None:
            return usual
        settings = {item.name: getattr(usual, item.name) for item in fields(usual)}
        return Replayed(**settings, pattern=self.pattern)
