"""The choice is carried out, learnt from, and never changes how the distribution is sampled."""

import numpy as np
import pytest
import torch
from mixture import MixtureDenoiser
from test_lossless import CHANNELS, SCHEDULE, step_through, tokens

from cspd.runtime.adaptive import AdaptiveHead, measure_heads
from cspd.runtime.lossless import SpeculativeHead
from cspd.runtime.member import HeadSample
from cspd.runtime.noise import Noise
from cspd.runtime.rounds import ReferenceRound
from cspd.runtime.speculation import SpeculationOptions, SpeculativeSample
from cspd.runtime.window import CostRecord, WindowChooser

STEPS = SCHEDULE.num_steps


def plain(rows, schedule, noise, purpose):
    out = step_through(rows, noise.seed)
    return HeadSample(out.final, out.final, out.final, out.sum_log_std)


def speculative(window=8, rows=None):
    options = SpeculationOptions(window, row_buckets=(rows,) if rows else ())
    return SpeculativeHead(ReferenceRound(MixtureDenoiser()), options, CHANNELS)


def adaptive(chain_ms, round_ms, seconds=0.001, **options):
    costs = CostRecord(
        key="k", num_steps=STEPS, plain=((1.0, chain_ms),), rounds=((1.0, round_ms),)
    )
    times = iter(np.arange(1000) * seconds)
    chooser = WindowChooser(costs, np.full(STEPS, 0.8), max_window=8)
    return AdaptiveHead(plain, speculative(), chooser, clock=lambda: next(times), **options)


def test_the_cheaper_way_is_taken_and_reported():
    heard = []
    head = adaptive(STEPS, 100.0, report=lambda choice, count: heard.append((choice.depth, count)))
    stepped = head(tokens(5), SCHEDULE, Noise(1))
    assert not isinstance(stepped, SpeculativeSample) and heard == [(None, 5)]
    assert torch.equal(stepped.sample, step_through(tokens(5), 1).final)
    assert isinstance(adaptive(STEPS, 1.0)(tokens(5), SCHEDULE, Noise(1)), SpeculativeSample)


@pytest.mark.parametrize("learning", [True, False])
def test_what_it_learns(learning):
    head = adaptive(STEPS, 1.0, seconds=60.0, learning=learning)
    head(tokens(50), SCHEDULE, Noise(1))
    # A minute instead of milliseconds: never again, unless it was told not to look.
    assert (head.chooser.choose(50).depth is None) == learning
    assert (head.chooser.acceptance != 0.8).any() == learning


def test_costs_are_measured_on_the_heads_themselves():
    ticks = iter(range(10_000))
    costs = measure_heads(
        plain, speculative, tokens, SCHEDULE, Noise(0), "k", clock=lambda: next(ticks)
    )
    # Every timed run takes one tick of a second: a chain 1000 ms, a round its share.
    assert {ms for _, ms in costs.plain} == {1000.0}
    assert [size for size, _ in costs.plain] == [1, 2, 4, 8, 16, 32]
    assert costs.num_steps == STEPS and len(costs.rounds) == 12
    assert all(1000 / STEPS <= ms <= 1000 for _, ms in costs.rounds)
    assert costs.rounds[0][0] >= 1 and costs.rounds[-1][0] > 32
    assert costs.chains(8) == costs.chains(16) == costs.plain and costs.chains(4) == ()
