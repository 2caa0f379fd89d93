"""One member of the pair: its transformer and its diffusion head behind two plain calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cspd.engines.schedule import Schedule
from cspd.engines.session import Session
from cspd.runtime.canvas import Batch, Canvas, Span
from cspd.runtime.noise import Noise, Purpose


@dataclass(frozen=True)
class HeadSample:
    """Sampled tokens and what is known of their law, each [N, C] float32.

    `mean` and `log_std` belong to the last denoising step, which adds no noise (so that `sample` is
    `mean`); `sum_log_std` adds up the steps before it. All without the temperature.
    """

    sample: Tensor
    mean: Tensor
    log_std: Tensor
    sum_log_std: Tensor


@dataclass(frozen=True)
class Rows:
    """Tokens to sample, flattened to N rows: all tensors [N], `conditions` [G, N, D].

    G is 2 with guidance (conditional, then unconditional) and 1 without.
    """

    conditions: Tensor
    guidance: Tensor
    temperature: Tensor
    images: Tensor
    positions: Tensor

    def take(self, index: Tensor) -> Rows:
        """The rows `index`, int64."""
        index = index.to(self.images.device)
        per_row = (self.guidance, self.temperature, self.images, self.positions)
        return Rows(self.conditions.index_select(1, index), *(value[index] for value in per_row))


class Head(Protocol):
    """A way to sample tokens from their conditions."""

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row; `purpose` keys the noise of the chain."""
        ...


@dataclass(frozen=True)
class LoopHead:
    """Plain sampling with the whole denoising loop in one session call."""

    session: Session

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row, in as many calls as the session's largest row count asks for."""
        limit = self.session.spec.axes["rows"].max
        parts = [
            self._sample(_slice(rows, i, i + limit), schedule, noise, purpose)
            for i in range(0, len(rows.images), limit)
        ]
        return _concatenate(parts)

    def _sample(self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose) -> HeadSample:
        channels = self.session.spec.inputs[0].shape[-1]
        assert isinstance(channels, int)
        start, steps = noise.chain(
            purpose, rows.images, rows.positions, schedule.num_steps, channels
        )
        outputs = self.session(
            noise0=start,
            noise=steps,
            conditions=rows.conditions,
            guidance=rows.guidance,
            temperature=rows.temperature,
            schedule=schedule.table,
        )
        return HeadSample(**outputs)


@dataclass(frozen=True)
class StepHead:
    """Plain sampling with one session call per denoising step, for engines without loops.

    `first`, where given, runs the first step in its place: a head in float32.
    """

    session: Session
    first: Session | None = None

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row; the rows must fit the session."""
        channels = self.session.spec.inputs[0].shape[-1]
        assert isinstance(channels, int)
        x, steps = noise.chain(purpose, rows.images, rows.positions, schedule.num_steps, channels)
        token = torch.arange(len(x), dtype=torch.int32, device=x.device)
        sum_log_std = torch.zeros_like(x)
        outputs: dict[str, Tensor] = {}
        for step in reversed(range(schedule.num_steps)):
            session = self.session
            if self.first is not None and step == schedule.num_steps - 1:
                session = self.first
            outputs = session(
                x=x,
                step=torch.full_like(token, step),
                token=token,
                conditions=rows.conditions,
                guidance=rows.guidance,
                schedule=schedule.table,
            )
            x = outputs["mean"]
            if step > 0:
                x = x + rows.temperature[:, None] * outputs["log_std"].exp() * steps[step]
                sum_log_std += outputs["log_std"]
        return HeadSample(x, outputs["mean"].clone(), outputs["log_std"].clone(), sum_log_std)


@dataclass(frozen=True)
class Member:
    """Draft or target: conditions from the transformer, tokens from the head."""

    name: str
    backbone: Session
    head: Head

    def conditions(
        self,
        canvas: Canvas,
        batch: Batch,
        span: Span,
        *,
        guided: bool,
        visible: list[int],
        width: int,
    ) -> Tensor:
        """Conditions [G, B, P, D] of the tokens in `span`, given the first `visible[b]` tokens.

        `width` is the padded number of visible tokens; the result for a sample depends on the other
        samples of the batch only through it.
        """
        device = canvas.tokens.device
        labels = batch.labels.int()
        branches = [labels, torch.full_like(labels, batch.null_label)] if guided else [labels]
        times = len(branches)
        z = self._run(
            tokens=canvas.tokens.repeat(times, 1, 1),
            visible=canvas.sequence[:, :width].repeat(times, 1),
            visible_len=torch.tensor(visible * times, dtype=torch.int32, device=device),
            labels=torch.cat(branches),
            positions=span.positions.repeat(times, 1),
        )
        return z.reshape(times, len(labels), *z.shape[1:])

    def _run(self, **inputs: Tensor) -> Tensor:
        """Call the transformer in pieces that its session takes."""
        limit = self.backbone.spec.axes["batch"].max
        if len(inputs["tokens"]) <= limit:
            return self.backbone(**inputs)["z"]
        starts = range(0, len(inputs["tokens"]), limit)
        pieces = ({name: t[i : i + limit] for name, t in inputs.items()} for i in starts)
        return torch.cat([self.backbone(**piece)["z"].clone() for piece in pieces])


def _slice(rows: Rows, start: int, stop: int) -> Rows:
    part = slice(start, stop)
    return Rows(
        rows.conditions[:, part], rows.guidance[part], rows.temperature[part],
        rows.images[part], rows.positions[part],
    )  # fmt: skip


def _concatenate(parts: list[HeadSample]) -> HeadSample:
    if len(parts) == 1:
        return parts[0]
    names = ("sample", "mean", "log_std", "sum_log_std")
    return HeadSample(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
