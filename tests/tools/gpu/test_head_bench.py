"""The benchmark of the head: replayed acceptance is what was asked for; the table compares."""

import numpy as np
import pytest
import torch
from rich.console import Console

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.engines.sessions.session import TorchSession
from cspd.export.graphs.speculative_loop import SpeculativeLoopGraph, speculative_loop_spec
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import PRESETS, MarConfig
from cspd.runtime.heads.base import Rows
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative_loop import SpeculativeLoopHead
from cspd.runtime.noise import Noise
from cspd.tools.bench.replay_numbers import ReplayNumbers
from cspd.tools.gpu.head_bench import (
    LOOP,
    REFERENCE,
    STEPS_OF_CALLS,
    measure,
    synthetic_setup,
    table,
)

CONFIG = MarConfig(4, 24, 1, 1, 2, head_width=40, head_depth=2)
SCHEDULE = make_schedule(ScheduleSpec(clip_timesteps=950), 20)


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_acceptance_is_replayed(rate):
    torch.manual_seed(0)
    spec = speculative_loop_spec(CONFIG, 4096)
    loop = TorchSession(spec, SpeculativeLoopGraph(DiffusionLoss(CONFIG)), torch.device("cpu"))
    rates = torch.full((20,), rate)
    head = SpeculativeLoopHead(
        loop, SpeculationOptions(8), numbers=lambda *args: ReplayNumbers(*args, rates)
    )
    count = 200
    conditions = torch.randn(2, count, 24)
    one, index = torch.ones(count), torch.arange(count)
    stats = head(Rows(conditions, one, one, index, index), SCHEDULE, Noise(0)).stats
    tested, accepted = stats.tested.sum(), stats.accepted.sum()
    # Four standard errors: a false alarm once in 16,000 seeds.
    assert abs(accepted / tested - rate) <= 4 * (rate * (1 - rate) / tested) ** 0.5
    # One candidate for every refusal.
    assert stats.draws == tested - accepted


def test_every_way_is_measured(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", CONFIG)
    with synthetic_setup("tiny", np.full(20, 0.8), (4,), 1, SCHEDULE) as setup:
        found = measure(setup, 3, 1)
    assert list(found) == [REFERENCE, STEPS_OF_CALLS, LOOP, "lossless, window 4"]
    assert 5 <= found["lossless, window 4"].calls < 20 <= found["lossless, window 4"].rows
    console = Console(record=True, width=120)
    console.print(table("title", found))
    assert console.export_text().count("1.00x") == 3
