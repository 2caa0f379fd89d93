"""What heads cost is measured on whole calls of the heads themselves."""

from chains import CHANNELS, SCHEDULE, step_through, tokens
from mixture import MixtureDenoiser
from reference_round import ReferenceRound

from cspd.runtime.costs.measure import Ways, measure_heads
from cspd.runtime.heads.base import HeadSample
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.noise import Noise

STEPS = SCHEDULE.num_steps


def plain(rows, schedule, noise, purpose):
    out = step_through(rows, noise.seed)
    return HeadSample(out.final, out.final, out.final, out.sum_log_std)


def speculative(window=8, rows=None):
    options = SpeculationOptions(window, row_buckets=(rows,) if rows else ())
    return SpeculativeHead(ReferenceRound(MixtureDenoiser()), options, CHANNELS)


def test_costs_are_measured_on_the_heads_themselves():
    ticks, counted = iter(range(10_000)), []
    ways = Ways(plain, speculative, counted.append)
    costs = measure_heads(ways, tokens, SCHEDULE, Noise(0), "k", clock=lambda: next(ticks))
    # Every timed run takes one tick of a second: a chain 1000 ms, a round its share.
    assert {ms for _, ms in costs.plain} == {1000.0}
    assert [size for size, _ in costs.plain] == [1, 2, 4, 8, 16, 32]
    assert costs.num_steps == STEPS and len(costs.rounds) == 12
    assert all(1000 / STEPS <= ms <= 1000 for _, ms in costs.rounds)
    assert costs.rounds[0][0] >= 1 and costs.rounds[-1][0] > 32
    assert costs.chains(8) == costs.chains(16) == costs.plain and costs.chains(4) == ()
    # A warm-up and five passes over six sizes, with two windows by rounds and two whole.
    assert len(counted) == 6 * 6 * 4
