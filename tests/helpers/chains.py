"""Denoising chains of the mixture with known answers, and stepping through them."""

from dataclasses import dataclass

import torch
from mixture import CHANNELS, MixtureDenoiser

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.runtime.heads.base import Rows
from cspd.runtime.noise import Noise, Purpose

SCHEDULE = make_schedule(ScheduleSpec(clip_timesteps=950), 16)
MIDDLE = 5
LEVEL, MUTANT_LEVEL = 1e-3, 1e-6


def tokens(count, guidance=1.5, temperature=1.0):
    identity = torch.arange(count)
    branch = torch.stack([torch.zeros(count), identity.float()], dim=1)
    conditions = torch.stack([branch, branch + torch.tensor([1.0, 0.0])])
    return Rows(
        conditions, torch.full((count,), guidance), torch.full((count,), temperature),
        identity // 7, identity % 7,
    )  # fmt: skip


@dataclass
class Sampled:
    final: torch.Tensor
    middle: torch.Tensor | None = None
    sum_log_std: torch.Tensor | None = None

    @property
    def joint(self):
        return torch.cat([self.middle, self.final], dim=1)


def step_through(rows, seed, denoiser=None, schedule=SCHEDULE):
    """Sequential sampling; `middle` is the state that step MIDDLE starts from."""
    denoiser, noise = denoiser or MixtureDenoiser(), Noise(seed)
    count = schedule.num_steps
    x, xi = noise.chain(Purpose.DENOISE, rows.images, rows.positions, count, CHANNELS)
    index, middle, total = torch.arange(len(x), dtype=torch.int32), x, torch.zeros_like(x)
    for step in reversed(range(count)):
        middle = x if step == MIDDLE else middle
        out = denoiser(
            x=x, step=torch.full_like(index, step), token=index, conditions=rows.conditions,
            guidance=rows.guidance, schedule=schedule.table,
        )  # fmt: skip
        x = out["mean"]
        if step:
            x = x + rows.temperature[:, None] * out["log_std"].exp() * xi[step]
            total = total + out["log_std"]
    return Sampled(x, middle, total)


def network_tokens(count):
    conditions = torch.randn(2, count, 24, generator=torch.Generator().manual_seed(2))
    identity = torch.arange(count)
    guidance, temperature = torch.linspace(1, 3, count), torch.linspace(0.8, 1.1, count)
    return Rows(conditions, guidance, temperature, identity, identity % 5)


def part_of(rows, index):
    per_token = [value[index] for value in list(vars(rows).values())[1:]]
    return Rows(rows.conditions[:, index], *per_token)
