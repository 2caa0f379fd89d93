"""Predicted costs against exact counts and simulation; the choice between ways to sample."""

import numpy as np
import pytest

from cspd.engines.errors import CspdError
from cspd.runtime.speculation import SpeculationStats
from cspd.runtime.window import (
    CostRecord,
    WindowChooser,
    arrivals,
    cost_at,
    cost_key,
    depths,
    measure_costs,
    predict,
)

STEPS = 40
ALWAYS, NEVER = np.ones(STEPS), np.zeros(STEPS)
TYPICAL = np.r_[0, 0.05, 0.2, 0.4, 0.6, np.full(STEPS - 5, 0.9)]


def full(window):
    return np.arange(1, STEPS + 1).clip(max=window)


def one(rows):
    return np.ones_like(rows)


def stats(tested, accepted):
    return SpeculationStats(1, 1, 1, 1, 0, np.array(tested), np.array(accepted))


def record(plain, rounds):
    return CostRecord(key="k", num_steps=STEPS, plain=plain, rounds=rounds)


@pytest.mark.parametrize("window", [1, 3, 8, STEPS])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rounds_when_every_draft_passes_or_none(window, tokens):
    assert predict(ALWAYS, full(window), tokens, one) == pytest.approx(-(-STEPS // window))
    assert predict(NEVER, full(window), tokens, one) == pytest.approx(STEPS)


def simulate(acceptance, depth, tokens, rng):
    """Rounds until the slowest token is done, and rows, of one run."""
    step, rounds, rows = np.full(tokens, STEPS - 1), 0, 0
    while (step >= 0).any():
        rounds += 1
        for i in np.flatnonzero(step >= 0):
            length, k = depth[step[i]], 0
            rows += length
            while k < length - 1 and rng.random() < acceptance[step[i] - k]:
                k += 1
            step[i] -= k + 1
    return rounds, rows


@pytest.mark.parametrize("tokens", [1, 6])
def test_prediction_agrees_with_simulation(tokens):
    depth, rng = depths(TYPICAL, 8, 0.2), np.random.default_rng(0)
    runs = np.array([simulate(TYPICAL, depth, tokens, rng) for _ in range(600)])
    # Four standard errors on either side: a false alarm once in 16,000 seeds, for each of four.
    for column, cost in enumerate((one, lambda rows: rows)):
        error = runs[:, column].std() / len(runs) ** 0.5
        expected = predict(TYPICAL, depth, tokens, cost)
        # Tokens are not quite independent of which rounds are the last; hence 2 % more.
        assert abs(runs[:, column].mean() - expected) < 4 * error + 0.02 * expected


def test_arrivals_and_depths():
    arrival = arrivals(TYPICAL, 4)
    assert arrival[20].tolist() == pytest.approx([1, 0.9, 0.81, 0.729])
    assert arrival[2].tolist() == pytest.approx([1, 0.2, 0.01, 0])
    assert depths(TYPICAL, 4, 0.8)[[0, 1, 2, 20]].tolist() == [1, 1, 1, 3]
    for reach in (0.0, 0.5):
        depth = depths(TYPICAL, 16, reach)
        assert (depth >= 1).all() and (depth <= full(16)).all()
    assert np.array_equal(depths(TYPICAL, 16, 0.0), full(16))


def test_cost_curve():
    points = ((1.0, 2.0), (4.0, 5.0), (8.0, 4.0), (16.0, 9.0))
    assert cost_at(points, np.array([1, 2.5, 8, 16])).tolist() == pytest.approx([2, 3, 4, 9])
    assert cost_at(points, 31.0) == pytest.approx(16)
    assert (np.diff(cost_at(points, np.linspace(0, 40, 100))) >= 0).all()


def test_free_rows_are_used_and_dear_rows_are_not():
    prior = TYPICAL
    plain = ((1.0, STEPS * 1.0), (8.0, STEPS * 1.0))
    free = WindowChooser(record(plain, ((1.0, 1.0), (256.0, 1.0))), prior, max_window=16)
    choice = free.choose(4)
    assert choice.depth.max() == 16 and choice.expected_ms < choice.plain_ms / 3
    linear = ((1.0, STEPS * 1.0), (8.0, STEPS * 8.0))
    dear = WindowChooser(record(linear, ((1.0, 1.0), (256.0, 256.0))), prior)
    assert dear.choose(4).depth is None
    assert "plain stepping" in dear.choose(4).reason and "speculation" in choice.reason
    middle = WindowChooser(record(plain, ((1.0, 1.0), (64.0, 4.0))), prior)
    assert 1 < middle.choose(2).depth.max() <= 16
    assert middle.choose(2).depth.mean() < choice.depth.mean()


def test_a_broken_promise_leads_back_to_plain_stepping():
    chooser = WindowChooser(record(((1.0, 100.0),), ((1.0, 5.0), (64.0, 6.0))), TYPICAL)
    plain_again = 0
    for _ in range(10):
        choice = chooser.choose(1)
        if choice.depth is None:
            plain_again += 1
            continue
        # It always takes a third more than plain stepping.
        chooser.observe(choice, stats(np.zeros(STEPS), np.zeros(STEPS)), 133.0)
    assert plain_again >= 7


def test_observed_acceptance_replaces_the_prior():
    chooser = WindowChooser(record(((1.0, 40.0),), ((1.0, 1.0), (64.0, 3.0))), NEVER)
    assert chooser.choose(1).depth is None
    chooser.observe(chooser.choose(1), stats(np.full(STEPS, 1000), np.full(STEPS, 950)), 40.0)
    assert chooser.acceptance == pytest.approx(np.full(STEPS, 0.95), abs=0.01)
    assert chooser.choose(1).depth is not None


def test_measurement_takes_the_least_of_the_repeats():
    chains = iter([0.5, 0.5, 3.0, 6.0, 2.0, 8.0])  # two sizes a pass, the first pass warms up
    calls = iter([(8, 0.1), (8, 0.1), (8, 1.5), (8, 1.5), (8, 1.0), (8, 1.0)])
    wholes = iter([0.1] * 4 + [5.0] * 4 + [4.0] * 4)
    costs = measure_costs(
        lambda _: next(chains), lambda *_: next(calls), lambda *_: next(wholes), key="k",
        num_steps=STEPS, tokens=(1, 4), windows=(4,), repeats=2,
    )  # fmt: skip
    assert costs.chains(8) == costs.chains(16) == ((1.0, 4.0), (4.0, 4.0))
    assert costs.plain == ((1.0, 2.0), (4.0, 6.0)) and costs.rounds == ((8.0, 1.0), (8.0, 1.0))
    assert CostRecord.model_validate_json(costs.model_dump_json()) == costs


def test_costs_of_something_else_are_refused():
    key = cost_key({"bundle": "a", "cpu": "b"})
    assert key == cost_key({"cpu": "b", "bundle": "a"}) != cost_key({"bundle": "a", "cpu": "c"})
    costs = record(((1.0, 1.0),), ((1.0, 1.0),))
    with pytest.raises(CspdError, match="cspd-run tune"):
        costs.require(key)
    assert costs.require("k") is costs
