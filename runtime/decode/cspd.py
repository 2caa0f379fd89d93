"""Continuous speculative decoding (arXiv 2411.11925): the draft proposes tokens, the target judges.

Approximate by construction, see `acceptance`. Two ways to verify a window of drafts: `parallel`, as
the authors released it, where the target conditions every drafted token on what was known before
the window; and `prefix`, the paper's Algorithm 1, where it conditions each drafted step on the
drafts before it, and the first rejection discards everything after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cspd.runtime.decode.canvas import Batch, Canvas, Span
from cspd.runtime.decode.decoder import Round
from cspd.runtime.decode.judge import judge
from cspd.runtime.decode.member import Model
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.decode.stats import Statistics, Verdicts
from cspd.runtime.decode.verify import verify
from cspd.runtime.decode.window import Judged, Window, gather_window
from cspd.runtime.heads.base import HeadSample
from cspd.runtime.noise import Purpose


@dataclass(frozen=True)
class Speculative:
    """`draft` proposes windows of tokens of `channels` numbers, `target` verifies them."""

    sampler: Sampler
    target: Model
    draft: Model
    options: CspdOptions
    channels: int

    def rounds(self, batch: Batch) -> Iterator[Round]:
        """Images by speculative decoding; the statistics hold the fate of every drafted token."""
        canvas = self.sampler.begin(batch, self.channels)
        statistics = Statistics(per_image=[Verdicts() for _ in range(batch.count)])
        yield from self._prefill(batch, canvas, statistics)
        while not canvas.done:
            window = self.propose(batch, canvas, statistics)
            samples = self.verify(batch, canvas, window)
            judged = judge(self.sampler, self.options, batch, window, samples)
            commit(canvas, judged)
            self._count(batch, judged, statistics)
            yield Round(canvas, statistics, judged)

    def _prefill(self, batch: Batch, canvas: Canvas, statistics: Statistics) -> Iterator[Round]:
        """The target generates the first tokens."""
        first = self.options.windows(self.sampler.plan).first
        while canvas.known[0] < first:
            self.sampler.step(self.target, canvas, batch)
            statistics.count_target()
            if canvas.known[0] >= first:
                statistics.prefilled += sum(canvas.known[: batch.count])
            yield Round(canvas, statistics)

    def propose(self, batch: Batch, canvas: Canvas, statistics: Statistics) -> Window:
        """Drafts of each sample's next window, a step of the draft at a time."""
        sampler, windows = self._ragged(batch), self.options.windows(self.sampler.plan)
        ahead, goal = canvas.clone(), [windows.stop(known) for known in canvas.known]
        purpose = Purpose.DENOISE if self.options.align else Purpose.DENOISE_DRAFT
        steps, starts = [], []
        while any(k < g for k, g in zip(ahead.known, goal, strict=True)):
            starts.append(list(ahead.known))
            span, sampled = sampler.step(self.draft, ahead, batch, purpose, goal)
            steps.append((span, sampled, sampler.guidance(span)))
            statistics.draft_calls += 1
        widest = windows.widest if sampler.widened else None
        return gather_window(canvas, ahead, steps, starts, widest)

    def verify(self, batch: Batch, canvas: Canvas, window: Window) -> HeadSample:
        """The target's own samples [B, P, C] of the tokens in `window`."""
        sampler = self._ragged(batch)
        return verify(sampler, self.target, self.options.verify, batch, canvas, window)

    def _ragged(self, batch: Batch) -> Sampler:
        """The sampler after the prefill: samples of a batch part ways at their first rejections."""
        ragged = self.options.verify == "prefix" and len(batch) > 1
        return dataclasses.replace(self.sampler, ragged=ragged)

    def _count(self, batch: Batch, judged: Judged, statistics: Statistics) -> None:
        """Count the target's evaluations, and the fate of every token that was proposed."""
        prefix = self.options.verify == "prefix"
        statistics.count_target(len(judged.window.starts[0]) if prefix else 1)
        distance = (judged.window.drafted.sample - judged.target.sample).norm(dim=-1)
        statistics.distance_sum += float((distance * judged.kept)[: batch.count].sum())
        valid, asked = judged.window.span.valid, self.options.on_reject == "target"
        own, discarded = judged.rejected & ~judged.resampled, valid & ~judged.kept
        replaced = own & asked, own & (not asked)
        masks = torch.stack((valid, judged.accepted, judged.resampled, *replaced, discarded))
        counts = masks.sum(-1).T.tolist()
        for row, start in enumerate(judged.window.span.start[: batch.count]):
            verdicts = Verdicts(*counts[row])
            statistics.record(start, verdicts)
            statistics.per_image[row].add(verdicts)


def commit(canvas: Canvas, judged: Judged) -> None:
    """Write the tokens that were kept to `canvas`, and note the fate of the drafts."""
    span, kept = judged.window.span, judged.kept
    canvas.place(Span(span.start, span.stop, span.positions, kept), judged.values)
    canvas.judge(span, judged.accepted, judged.rejected)
    canvas.known = [k + n for k, n in zip(canvas.known, kept.sum(1).tolist(), strict=True)]
