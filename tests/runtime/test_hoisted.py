"""Hoisting changes neither stepping nor speculation, whatever the memory budget."""

import pytest
import torch

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.engines.session import TorchSession
from cspd.export.graphs import DenoiserGraph, denoiser_spec
from cspd.export.mar import DiffusionLoss
from cspd.export.modulation import (
    HeadModulationGraph,
    HoistedDenoiserGraph,
    hoisted_spec,
    modulation_bytes,
    modulation_spec,
)
from cspd.export.presets import MarConfig
from cspd.runtime.hoisted import HoistedHead
from cspd.runtime.lossless import SpeculativeHead
from cspd.runtime.member import Rows, StepHead
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.rounds import ReferenceRound
from cspd.runtime.speculation import SpeculationOptions

CONFIG = MarConfig(4, 24, 1, 1, 2, head_width=40, head_depth=2)
SCHEDULE = make_schedule(ScheduleSpec(clip_timesteps=950), 12)
CPU = torch.device("cpu")


def speculative(denoiser):
    options = SpeculationOptions(window=5)
    return SpeculativeHead(ReferenceRound(denoiser), options, CONFIG.token_dim)


@pytest.fixture(scope="module")
def sessions():
    torch.manual_seed(1)
    head = DiffusionLoss(CONFIG)
    return (
        TorchSession(denoiser_spec(CONFIG, 64), DenoiserGraph(head), CPU),
        TorchSession(modulation_spec(CONFIG, 64), HeadModulationGraph(head), CPU),
        TorchSession(hoisted_spec(CONFIG, 64), HoistedDenoiserGraph(head), CPU),
    )


@pytest.fixture(scope="module")
def rows():
    conditions = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))
    guidance = torch.linspace(1, 2, 7)
    return Rows(conditions, guidance, torch.ones(7), torch.arange(7), torch.arange(7))


@pytest.mark.parametrize("kind", [StepHead, speculative])
@pytest.mark.parametrize("tokens", [7, 3, 1, 0])
def test_same_samples_as_the_whole_head(sessions, rows, kind, tokens):
    denoiser, modulate, hoisted = sessions
    memory = tokens * modulation_bytes(CONFIG, SCHEDULE.num_steps, 2)
    head = HoistedHead(modulate, hoisted, kind, memory)
    assert head.chunk_size(2, SCHEDULE.num_steps) == max(1, tokens)
    expected = kind(denoiser)(rows, SCHEDULE, Noise(4), Purpose.DENOISE)
    got = head(rows, SCHEDULE, Noise(4), Purpose.DENOISE)
    assert type(got) is type(expected)
    for name in ("sample", "mean", "log_std", "sum_log_std"):
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=1e-3, atol=1e-3
        )
