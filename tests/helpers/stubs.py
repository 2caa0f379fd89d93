"""Stub networks: conditions tell what the transformer saw, heads do as they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tiny_pair import make_batch
from torch import Tensor

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.runtime.decode.canvas import Batch
from cspd.runtime.decode.member import Member
from cspd.runtime.decode.plan import MaskPlan
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.heads.base import HeadSample, Rows
from cspd.runtime.noise import Noise, Purpose

LENGTH, CHANNELS = 16, 4
SPEC = GraphSpec(
    name="backbone",
    inputs=(TensorSpec(name="tokens", shape=("batch", LENGTH, CHANNELS)),),
    outputs=(TensorSpec(name="z", shape=("batch", 1)),),
    axes={"batch": Axis(min=1, opt=8, max=1000)},
)


@dataclass
class StubBackbone:
    """Condition [sum of visible tokens, their number, label], the same at every position."""

    spec: GraphSpec = SPEC
    device: str = "cpu"
    calls: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.calls.append({name: tensor.clone() for name, tensor in inputs.items()})
        visible, length = inputs["visible"].long(), inputs["visible_len"]
        known = torch.arange(visible.shape[1]) < length[:, None]
        seen = inputs["tokens"].sum(-1).gather(1, visible) * known
        # A sum in a fixed order, so that padding does not change its rounding.
        total = torch.zeros(len(length))
        for column in seen.unbind(1):
            total = total + column
        z = torch.stack([total, length.float(), inputs["labels"].float()], dim=1)
        return {"z": z[:, None].expand(-1, inputs["positions"].shape[1], -1).contiguous()}


Rule = Callable[[Rows], Tensor]


@dataclass
class StubHead:
    """Samples 0.1 * start noise + `shift`; a call is recorded as (purpose, rows, sample).

    `shift` maps rows to [N] or a number; `log_std` and `sum_log_std` are those of every channel.
    """

    shift: Rule | float = 0.0
    log_std: float = 0.0
    sum_log_std: float = 0.0
    calls: list[tuple[Purpose, Rows, Tensor]] = field(default_factory=list)

    def __call__(self, rows: Rows, schedule, noise: Noise, purpose: Purpose) -> HeadSample:
        start, _ = noise.chain(purpose, rows.images, rows.positions, schedule.num_steps, CHANNELS)
        shift = self.shift(rows) if callable(self.shift) else torch.full((len(start),), self.shift)
        sample = 0.1 * start + shift[:, None]
        self.calls.append((purpose, rows, sample.clone()))
        log_std, total = (torch.full_like(sample, v) for v in (self.log_std, self.sum_log_std))
        return HeadSample(sample, sample.clone(), log_std, total)


def member(name: str, **head) -> Member:
    return Member(name, StubBackbone(), StubHead(**head))


def make_sampler(seed: int = 0, num_iter: int = 8, noise: Noise | None = None, **more) -> Sampler:
    """A sampler with few steps; `cfg` and `cfg_schedule` go to the plan, the rest to Sampler."""
    plan = MaskPlan(LENGTH, num_iter, more.pop("cfg", 1.0), more.pop("cfg_schedule", "linear"))
    schedule = make_schedule(ScheduleSpec(clip_timesteps=950), 3)
    return Sampler(plan, schedule, noise or Noise(seed), **more)


def batch_of(*images: int) -> Batch:
    return make_batch(list(images))


def by_token(head: StubHead, purpose: Purpose | None = None) -> dict[tuple[int, int], list]:
    """What a head was asked for: (image, position) -> [(guidance, condition, sample), ...]."""
    found: dict[tuple[int, int], list] = {}
    for called, rows, sample in head.calls:
        if purpose is not None and called != purpose:
            continue
        for row, key in enumerate(zip(rows.images.tolist(), rows.positions.tolist(), strict=True)):
            entry = (rows.guidance[row].item(), rows.conditions[0, row].tolist(), sample[row])
            found.setdefault(key, []).append(entry)
    return found
