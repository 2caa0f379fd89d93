"""One model alone, the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cspd.runtime.decode.canvas import Batch
from cspd.runtime.decode.decoder import Round
from cspd.runtime.decode.member import Model
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.decode.stats import Statistics


@dataclass(frozen=True)
class Alone:
    """`member` generates every token, of `channels` numbers, itself."""

    sampler: Sampler
    member: Model
    channels: int

    def rounds(self, batch: Batch) -> Iterator[Round]:
        """The images, an autoregressive step at a time."""
        canvas = self.sampler.begin(batch, self.channels)
        statistics = Statistics()
        while not canvas.done:
            self.sampler.step(self.member, canvas, batch)
            if self.member.name == "draft":
                statistics.draft_calls += 1
            else:
                statistics.count_target()
            yield Round(canvas, statistics)
