"""Shared ground of the decoding methods: the settings of a run and one autoregressive step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cspd.engines.errors import NonFiniteError, overflow_advice
from cspd.engines.schedule import Schedule
from cspd.runtime.decode.canvas import Batch, Canvas, Span
from cspd.runtime.decode.member import Model
from cspd.runtime.decode.plan import Plan
from cspd.runtime.heads.base import HeadSample, Rows
from cspd.runtime.heads.steps import Annealing
from cspd.runtime.noise import Noise, Purpose


@dataclass(frozen=True)
class Sampler:
    """What every method needs: plan, schedule, noise, temperature.

    With `fixed_shapes`, all shapes depend on the settings alone and never on the other samples of a
    batch, so that an image is the same to the last bit whatever it is generated with.
    `ragged` says that these may know different numbers of tokens. `annealing` replaces `schedule`
    where the number of denoising steps is not the same for all tokens.
    """

    plan: Plan
    schedule: Schedule
    noise: Noise
    temperature: float = 1.0
    fixed_shapes: bool = True
    ragged: bool = False
    annealing: Annealing | None = None

    @property
    def guided(self) -> bool:
        """Whether the unconditional branch is needed at all."""
        return self.plan.cfg != 1.0

    @property
    def widened(self) -> bool:
        """Whether everything is padded to the largest shape that the settings allow."""
        return self.ragged and self.fixed_shapes

    def begin(self, batch: Batch, channels: int) -> Canvas:
        """A canvas for `batch` on which nothing is known."""
        return Canvas.empty(self.plan.sequence(batch.images, self.noise), channels)

    def next_span(self, canvas: Canvas, goal: list[int] | None = None) -> Span:
        """The tokens of each sample's next autoregressive step.

        There are none for samples that know `goal` [B] tokens already, by default all of them.
        """
        goal = goal or [self.plan.num_tokens] * len(canvas.known)
        pairs = zip(canvas.known, goal, strict=True)
        stop = [self.plan.stop(known) if known < end else known for known, end in pairs]
        return canvas.span(canvas.known, stop, self.plan.widest if self.widened else None)

    def guidance(self, span: Span) -> Tensor:
        """Guidance scale of every token of `span`, [B, P] on its device."""
        length = self.plan.num_tokens
        scales = [self.plan.guidance(min(k, length - 1)) for k in span.start]
        column = torch.tensor(scales, device=span.positions.device)
        return column[:, None].expand(-1, span.width)

    def step_counts(self, known: Tensor) -> Tensor | None:
        """Denoising steps of tokens that are generated when `known` [B, P] are known; [B, P].

        On the host, as `known`; None where all have those of `schedule`.
        """
        if self.annealing is None:
            return None
        last = self.plan.num_iter - 1
        by_known = [
            self.annealing.steps.at(min(self.plan.index(k), last), self.plan.num_iter)
            for k in range(self.plan.num_tokens + 1)
        ]
        return torch.tensor(by_known)[known]

    def visible_width(self, known: list[int]) -> int:
        """Padded number of visible tokens for samples that know `known` tokens."""
        return self.plan.num_tokens if self.widened else max(known)

    def conditions(self, member: Model, canvas: Canvas, batch: Batch, span: Span) -> Tensor:
        """Conditions [G, B, P, D] of `span` from the tokens that come before it."""
        width = self.visible_width(span.start)
        return member.conditions(
            canvas, batch, span, guided=self.guided, visible=span.start, width=width
        )

    def sample(
        self,
        member: Model,
        z: Tensor,
        guidance: Tensor,
        batch: Batch,
        span: Span,
        purpose: Purpose,
        counts: Tensor | None = None,
    ) -> HeadSample:
        """Tokens of `span` from their conditions `z` [G, B, P, D]; every result is [B, P, C].

        `counts` [B, P]: denoising steps of each, by default those of the step that `span` starts.
        """
        images = batch.images[:, None].expand(-1, span.width).flatten()
        rows = Rows(
            conditions=z.flatten(1, 2).contiguous(),
            guidance=guidance.flatten().contiguous(),
            temperature=torch.full((len(images),), self.temperature, device=z.device),
            images=images,
            positions=span.positions.flatten().long(),
        )
        if self.annealing is None:
            out = member.head(rows, self.schedule, self.noise, purpose)
        else:
            if counts is None:
                counts = self.step_counts(torch.tensor(span.start)[:, None].expand(-1, span.width))
            assert counts is not None
            out = self.annealing.sample(
                member.head, rows, counts.flatten(), self.noise, purpose, whole=self.widened
            )
        shape = (len(batch), span.width, -1)
        parts = (out.sample, out.mean, out.log_std, out.sum_log_std)
        sampled = HeadSample(*(part.reshape(shape) for part in parts))
        check_finite(member, sampled, batch, span)
        return sampled

    def step(
        self,
        member: Model,
        canvas: Canvas,
        batch: Batch,
        purpose: Purpose = Purpose.DENOISE,
        goal: list[int] | None = None,
    ) -> tuple[Span, HeadSample]:
        """One autoregressive step of `member` towards `goal`: writes its tokens to `canvas`."""
        span = self.next_span(canvas, goal)
        z = self.conditions(member, canvas, batch, span)
        sampled = self.sample(member, z, self.guidance(span), batch, span, purpose)
        canvas.place(span, sampled.sample)
        canvas.known = list(span.stop)
        return span, sampled


def check_finite(member: Model, sampled: HeadSample, batch: Batch, span: Span) -> None:
    """Raise NonFiniteError for the first image whose tokens are not finite: one check a step."""
    finite = sampled.sample.isfinite().all(-1).all(-1)
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0])
    raise NonFiniteError(
        f"{member.name} denoiser: NaN or infinity in image {int(batch.images[row])} at the "
        f"autoregressive step that starts with {span.start[row]} known tokens; no image of "
        f"this batch was saved. {overflow_advice()}"
    )
