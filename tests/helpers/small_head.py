"""The settings of a small head, and tokens for it."""

import torch

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.export.mar.presets import MarConfig
from cspd.runtime.heads.base import Rows

CONFIG = MarConfig(4, 24, 1, 1, 2, head_width=40, head_depth=2)
SCHEDULE = make_schedule(ScheduleSpec(clip_timesteps=950), 20)
CPU = torch.device("cpu")


def tokens(count, branches=2):
    conditions = torch.randn(branches, count, 24, generator=torch.Generator().manual_seed(4))
    guidance, temperature = torch.linspace(1, 2, count), torch.linspace(0.9, 1.1, count)
    return Rows(conditions, guidance, temperature, torch.arange(count), torch.arange(count) % 3)
