"""Predicted costs against exact counts and simulation; the choice between ways to sample."""

import numpy as np
import pytest

from cspd.engines.errors import CspdError
from cspd.runtime.costs.predict import (
    CostRecord,
    Forecast,
    arrivals,
    cost_at,
    cost_key,
    measure_costs,
    predict,
)

STEPS = 40
ALWAYS, NEVER = np.ones(STEPS), np.zeros(STEPS)
TYPICAL = np.r_[0, 0.05, 0.2, 0.4, 0.6, np.full(STEPS - 5, 0.9)]


def one(rows):
    return np.ones_like(rows)


def record(plain, rounds):
    return CostRecord(key="k", num_steps=STEPS, plain=plain, rounds=rounds)


@pytest.mark.parametrize("window", [1, 3, 8, STEPS])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rounds_when_every_draft_passes_or_none(window, tokens):
    assert predict(ALWAYS, window, tokens, one) == pytest.approx(-(-STEPS // window))
    assert predict(NEVER, window, tokens, one) == pytest.approx(STEPS)


def simulate(acceptance, window, tokens, rng):
    """Rounds until the slowest token is done, and rows, of one run."""
    step, rounds, rows = np.full(tokens, STEPS - 1), 0, 0
    while (step >= 0).any():
        rounds += 1
        for i in np.flatnonzero(step >= 0):
            length, k = min(window, step[i] + 1), 0
            rows += length
            while k < length - 1 and rng.random() < acceptance[step[i] - k]:
                k += 1
            step[i] -= k + 1
    return rounds, rows


@pytest.mark.parametrize("tokens", [1, 6])
def test_prediction_agrees_with_simulation(tokens):
    rng = np.random.default_rng(0)
    runs = np.array([simulate(TYPICAL, 8, tokens, rng) for _ in range(600)])
    # Four standard errors on either side: a false alarm once in 16,000 seeds, for each of four.
    for column, cost in enumerate((one, lambda rows: rows)):
        error = runs[:, column].std() / len(runs) ** 0.5
        expected = predict(TYPICAL, 8, tokens, cost)
        # Tokens are not quite independent of which rounds are the last; hence 2 % more.
        assert abs(runs[:, column].mean() - expected) < 4 * error + 0.02 * expected


def test_arrivals():
    arrival = arrivals(TYPICAL, 4)
    assert arrival[20].tolist() == pytest.approx([1, 0.9, 0.81, 0.729])
    assert arrival[2].tolist() == pytest.approx([1, 0.2, 0.01, 0])


def test_cost_curve():
    points = ((1.0, 2.0), (4.0, 5.0), (8.0, 4.0), (16.0, 9.0))
    assert cost_at(points, np.array([1, 2.5, 8, 16])).tolist() == pytest.approx([2, 3, 4, 9])
    assert cost_at(points, 31.0) == pytest.approx(16)
    assert (np.diff(cost_at(points, np.linspace(0, 40, 100))) >= 0).all()


def test_a_forecast_is_measured_or_predicted():
    known = record(((1.0, 40.0), (2.0, 60.0)), ((1.0, 1.0), (64.0, 3.0)))
    known = known.model_copy(update={"whole": ((8, 1.0, 20.0), (8, 2.0, 30.0))})
    forecast = Forecast(known, TYPICAL)
    assert forecast.plain(2) == pytest.approx(60)
    assert forecast.speculative(2, 8, fixed=True) == pytest.approx(30)
    # Not fixed, or not measured whole: rounds times what a round costs.
    rounds, rows = (predict(TYPICAL, 8, 2, cost) for cost in (one, lambda rows: rows))
    spent = rounds + (rows - rounds) * 2 / 63
    assert forecast.speculative(2, 8, fixed=False) == pytest.approx(spent)
    full = predict(TYPICAL, 4, 2, one) * (1 + (2 * 4 - 1) * 2 / 63)
    assert forecast.speculative(2, 4, fixed=True) == pytest.approx(full)
    assert forecast.windows(fixed=True) == (8,) and 3 in forecast.windows(fixed=False)


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
