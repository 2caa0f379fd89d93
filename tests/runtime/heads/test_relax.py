"""What the relaxed rules guarantee, and that without relaxation nothing changes."""

from functools import partial
from statistics import NormalDist

import coupling
import pytest
import torch
from chains import CHANNELS, SCHEDULE, tokens
from coupling import Gaussian
from mixture import MixtureDenoiser
from reference_round import ReferenceRound

from cspd.engines.errors import CspdError
from cspd.runtime.heads.numbers import ChainNumbers
from cspd.runtime.heads.relax import LenientNumbers, total_variation
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.noise import Noise, Purpose


def run(numbers):
    session, options = ReferenceRound(MixtureDenoiser()), SpeculationOptions(window=8)
    return SpeculativeHead(session, options, CHANNELS, numbers)(tokens(200), SCHEDULE, Noise(21))


def lenient(budget):
    return run(partial(LenientNumbers, budget=budget))


def test_no_budget_is_the_exact_rule_to_the_bit():
    exact = run(ChainNumbers)
    assert torch.equal(exact.sample, lenient(0.0).sample)


def test_a_budget_saves_at_most_its_refusals():
    """Which are few: see `LenientNumbers`. Level 1e-4: four standard errors of a Poisson count."""
    exact, loose = lenient(0.0).stats, lenient(1.0).stats
    refused = [int((stats.tested - stats.accepted).sum()) for stats in (exact, loose)]
    saved = refused[0] - refused[1]
    assert 0 < saved <= 200 + 4 * (sum(refused) ** 0.5)


def accepted_share(shift, budget, count=200_000):
    """Share of `count` drafts from N(shift, 1) that pass the test for N(0, 1); one step of 11."""
    where = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    xi = torch.randn(count, 1, generator=torch.Generator().manual_seed(6))
    zero, one = torch.zeros(count, 1), torch.ones(count, 1)
    target, drafted = Gaussian(zero, zero, one), Gaussian(zero + shift, zero, one)
    tests = LenientNumbers(Noise(7), Purpose.DENOISE, budget).tests(*where, 11)
    ratio = coupling.log_ratio(target, drafted, drafted.at(xi), xi)
    return coupling.accept(tests[4], ratio).double().mean().item()


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_total_variation_rule_gives_up_no_more_than_its_share(shift):
    exact, loose = accepted_share(shift, 0.0), accepted_share(shift, 0.5)
    overlap = 2 * NormalDist().cdf(-shift / 2)  # of two normal distributions, `shift` apart
    # Level 1e-4: four standard errors of a share of 200,000.
    assert exact == pytest.approx(overlap, abs=4 * 0.5 / 200_000**0.5)
    # A budget of 0.5 over ten tests: the distribution of this one moves by what more is accepted.
    assert 0.2 * 0.05 < loose - exact <= 0.05


@pytest.mark.parametrize("text", ["tv=2", "tv=-1", "tv", "tv=a", "tv=nan", "sigma=0.5", "lambda=1"])
def test_wrong_words_are_refused(text):
    with pytest.raises(CspdError, match=r"--relax is .*expected tv=0\.\.1"):
        total_variation(text)


def test_amount_of_a_relaxation():
    assert total_variation("tv=0.05") == 0.05 and total_variation("tv=0") == 0
