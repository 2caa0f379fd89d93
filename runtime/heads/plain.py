"""Plain sampling: the denoising chain step by step, or as one loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cspd.engines.schedule import Schedule
from cspd.engines.sessions.session import Session
from cspd.runtime.heads.base import HeadSample, Rows, concatenate, part_of
from cspd.runtime.noise import Noise, Purpose

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
    return concatenate(parts)


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
