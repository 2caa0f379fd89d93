"""The choice for a run against costs that leave no doubt."""

import numpy as np
import pytest

from cspd.runtime.config import make_config
from cspd.runtime.costs.choose import choose, tokens_together
from cspd.runtime.costs.predict import CostRecord, Forecast, predict

STEPS = 40
TYPICAL = np.r_[0, 0.05, 0.2, 0.4, 0.6, np.full(STEPS - 5, 0.9)]


def chooser(plain, rounds):
    costs = CostRecord(key="k", num_steps=STEPS, plain=plain, rounds=rounds)
    return Forecast(costs, TYPICAL)


def decide(costs, tokens, *, fixed=True, max_rows=1024, window=None):
    return choose("target", costs, tokens, fixed=fixed, max_rows=max_rows, window=window)


FREE = chooser(((1.0, 40.0), (32.0, 40.0)), ((1.0, 1.0), (512.0, 1.0)))
LINEAR = chooser(((1.0, 40.0), (32.0, 1280.0)), ((1.0, 1.0), (512.0, 512.0)))
# A round costs as much as a step up to 16 rows, then by the row: pays for one token, not for 32.
MIXED = chooser(((1.0, 40.0), (32.0, 80.0)), ((1.0, 1.0), (16.0, 1.0), (512.0, 32.0)))


def test_free_rows_are_speculated_with_for_any_number():
    found = decide(FREE, [1, 4, 8])
    assert found.choice.up_to == 8 and found.choice.window >= 8
    assert "speculation with" in found.reason


def test_dear_rows_never():
    found = decide(LINEAR, [1, 4, 8])
    assert found.choice.up_to == 0 and found.reason.startswith("plain stepping")


def test_few_tokens_speculate_and_many_step():
    found = decide(MIXED, [1, 1, 2, 32])
    assert 1 <= found.choice.up_to < 32 and "plain stepping for more" in found.reason


@pytest.mark.parametrize("costs", [FREE, LINEAR, MIXED])
@pytest.mark.parametrize("tokens", [[1], [4, 8], [1, 2, 32]])
def test_never_more_than_plain_stepping_by_its_own_prediction(costs, tokens):
    choice = decide(costs, tokens).choice
    plain = {1: 40.0, **{n: float(np.interp(n, *np.array(costs.costs.plain).T)) for n in tokens}}
    sizes, spent = np.array(costs.costs.rounds).T
    for n in tokens:
        if n <= choice.up_to:
            cost = float(np.interp(n * choice.window, sizes, spent))
            assert predict(TYPICAL, choice.window, n, lambda rows, c=cost: c) < 0.97 * plain[n]


def test_whole_chains_that_were_measured_count_more_than_predictions():
    """Rounds look free, whole chains are dearer than stepping for all but one token."""
    whole = ((8, 1.0, 39.0), (8, 8.0, 39.0), (16, 1.0, 10.0), (16, 8.0, 39.0))
    costs = FREE.costs.model_copy(update={"whole": whole})
    measured = Forecast(costs, TYPICAL)
    assert decide(measured, [8]).choice.up_to == 0
    found = decide(measured, [1, 8]).choice
    assert (found.window, found.up_to) == (16, 1)
    # Runs that drop finished rows go by prediction; so does a window that was not measured.
    assert decide(measured, [8], fixed=False).choice.up_to == 8
    assert decide(measured, [8], window=12).choice.window == 12


def test_own_window_is_kept():
    assert decide(FREE, [1], window=5).choice.window == 5


def test_rows_that_do_not_fit_into_a_call():
    assert decide(FREE, [1, 64], max_rows=64).choice.up_to == 1


def test_padded_calls_are_dearer():
    """Rounds of a fixed shape evaluate all rows to the end; others shrink with the tokens."""
    costs = chooser(((1.0, 40.0), (32.0, 200.0)), ((1.0, 1.0), (512.0, 170.0)))
    fixed, free = (decide(costs, [16], fixed=fixed) for fixed in (True, False))
    assert fixed.choice.up_to <= free.choice.up_to


def test_tokens_together():
    config = make_config(labels=(1,), num_images=1, num_iter=4, batch_size=2, method="auto")
    assert sum(tokens_together("target", config, 16)) == 32
    drafts = config.model_copy(update={"method": "cspd", "head": "auto", "gamma": 5})
    assert tokens_together("target", drafts, 16) == [10]
    assert sum(tokens_together("draft", drafts, 16)) == 32
