"""One member of the pair: its transformer and its diffusion head behind two plain calls."""

from __future__ import annotations

from collections.abc import Callable
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
    """Sampled tokens and what is known of their distribution, each [N, C] float32.

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


# Bytes that a denoising loop may hold for what it computes once ahead of all steps.
DEFAULT_MEMORY = 512 << 20
# A denoising loop with the inputs and outputs of the graph `denoiser_loop`.
Loop = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class LoopHead:
    """Plain sampling with the whole denoising loop in one session call.

    Calls are cut so that what the loop prepares for all of its steps fits into `memory` bytes.
    """

    session: Session
    memory: int = DEFAULT_MEMORY

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row, in as many calls as the session's largest row count asks for."""
        limit = tokens_within(self.session, self.memory, schedule, rows)
        return _sample(self.session, self.session, limit, rows, schedule, noise, purpose)


def tokens_within(session: Session, memory: int, schedule: Schedule, rows: Rows) -> int:
    """Most tokens of one call of a loop, by its largest row count and `memory` bytes."""
    axes, token_bytes = session.spec.axes, ahead_of_steps(session, schedule, rows)
    limit = axes["rows" if "rows" in axes else "tokens"].max
    return min(limit, max(1, memory // max(token_bytes, 1)))


def ahead_of_steps(session: Session, schedule: Schedule, rows: Rows) -> int:
    """Bytes of what `session` computes of one token of `rows` once for all steps."""
    return 4 * session.spec.scratch * schedule.num_steps * len(rows.conditions)


@dataclass(frozen=True)
class StepHead:
    """Plain sampling with one session call per denoising step, for engines without loops.

    `first`, where given, runs the first step in its place: a head in float32. `modulate`, where
    given, computes the modulations ahead of the steps, and `session` takes them for the conditions.
    `captured`, where given, is the loop over all of them that runs instead, as a CUDA graph.
    """

    session: Session
    first: Session | None = None
    captured: Loop | None = None
    modulate: Session | None = None

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row, in as many loops as the session's largest row count asks for."""
        loop = self.captured or step_loop(self.session, self.first, self.modulate)
        limit = step_limit(self.session)
        return _sample(loop, self.session, limit, rows, schedule, noise, purpose)


def step_limit(session: Session) -> int:
    """Most tokens of one call of a denoising step, each of which has one row."""
    return min(session.spec.axes[name].max for name in ("rows", "tokens"))


def step_loop(session: Session, first: Session | None, modulate: Session | None = None) -> Loop:
    """The denoising loop over the steps of `session`; `first`, if given, takes the first one.

    With `modulate` (head_modulation), `session` takes its table in place of the conditions.
    """

    def run(
        *, noise0: Tensor, noise: Tensor, conditions: Tensor, guidance: Tensor,
        temperature: Tensor, schedule: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        x, last = noise0, len(schedule) - 1
        token = torch.arange(len(x), dtype=torch.int32, device=x.device)
        sum_log_std = torch.zeros_like(x)
        seen = whole = {"conditions": conditions}
        outputs: dict[str, Tensor] = {}
        if modulate is not None:
            table = modulate(conditions=conditions, schedule=schedule)["modulation"]
            seen = {"modulation": table}
        for step in range(last, -1, -1):
            denoise, condition = session, seen
            if first is not None and step == last:
                denoise, condition = first, whole
            outputs = denoise(
                x=x,
                step=torch.full_like(token, step),
                token=token,
                guidance=guidance,
                schedule=schedule,
                **condition,
            )
            x = outputs["mean"]
            if step > 0:
                x = x + temperature[:, None] * outputs["log_std"].exp() * noise[step]
                sum_log_std = sum_log_std + outputs["log_std"]
        mean, log_std = outputs["mean"].clone(), outputs["log_std"].clone()
        return {"sample": mean, "mean": mean, "log_std": log_std, "sum_log_std": sum_log_std}

    return run


def _sample(
    loop: Loop, session: Session, limit: int, rows: Rows, schedule: Schedule, noise: Noise,
    purpose: Purpose,
) -> HeadSample:  # fmt: skip
    """Run `loop` on every row, in pieces of at most `limit` that `session` takes."""
    parts = [
        _piece(loop, session, part_of(rows, i, i + limit), schedule, noise, purpose)
        for i in range(0, len(rows.images), limit)
    ]
    return _concatenate(parts)


def _piece(
    loop: Loop, session: Session, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
) -> HeadSample:
    channels = session.spec.inputs[0].shape[-1]
    assert isinstance(channels, int)
    start, steps = noise.chain(purpose, rows.images, rows.positions, schedule.num_steps, channels)
    outputs = loop(
        noise0=start,
        noise=steps,
        conditions=rows.conditions,
        guidance=rows.guidance,
        temperature=rows.temperature,
        schedule=schedule.table,
    )
    return HeadSample(**outputs)


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


def part_of(rows: Rows, start: int, stop: int) -> Rows:
    """Tokens `start` to `stop` of `rows`."""
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
