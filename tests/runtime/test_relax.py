"""What the relaxed rules guarantee, and that without relaxation nothing changes."""

import pytest
import torch
from mixture import MixtureDenoiser
from test_lossless import CHANNELS, SCHEDULE, step_through, tokens

from cspd.engines.errors import CspdError
from cspd.runtime import coupling
from cspd.runtime.chain_numbers import ChainNumbers
from cspd.runtime.coupling import Gaussian, excess_mass
from cspd.runtime.lossless import SpeculativeHead
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.relax import LenientNumbers, Relaxation, SameNoiseRound
from cspd.runtime.rounds import ReferenceRound
from cspd.runtime.speculation import SpeculationOptions


def run(round_session, numbers=ChainNumbers):
    head = SpeculativeHead(round_session, SpeculationOptions(window=8), CHANNELS, numbers)
    return head(tokens(200), SCHEDULE, Noise(21))


def lenient(budget):
    return run(ReferenceRound(MixtureDenoiser()), Relaxation("tv", budget).numbers)


def same_noise(tolerance):
    return run(SameNoiseRound(MixtureDenoiser(), tolerance))


def test_no_budget_is_the_exact_rule_to_the_bit():
    exact = run(ReferenceRound(MixtureDenoiser()))
    assert torch.equal(exact.sample, lenient(0.0).sample)


def test_a_budget_saves_at_most_its_refusals():
    """Which are few: see `LenientNumbers`. Level 1e-4: four standard errors of a Poisson count."""
    exact, loose = lenient(0.0).stats, lenient(1.0).stats
    refused = [int((stats.tested - stats.accepted).sum()) for stats in (exact, loose)]
    saved = refused[0] - refused[1]
    assert 0 < saved <= 200 + 4 * (sum(refused) ** 0.5)


def test_no_tolerance_is_stepping_to_the_bit():
    assert torch.equal(same_noise(0.0).sample, step_through(tokens(200), 21).final)


def test_more_tolerance_takes_fewer_rounds_and_strays_further():
    results = [same_noise(amount) for amount in (0.0, 0.3, 1.0, 3.0)]
    rounds = [result.stats.calls for result in results]
    errors = [(result.sample - results[0].sample).norm().item() for result in results]
    assert rounds == sorted(rounds, reverse=True) and rounds[-1] < rounds[0] / 2
    assert errors == sorted(errors) and errors[1] > 0


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
    # Level 1e-4: four standard errors of a share of 200,000.
    assert exact == pytest.approx(1 - excess_mass(shift), abs=4 * 0.5 / 200_000**0.5)
    # A budget of 0.5 over ten tests: the distribution of this one moves by what more is accepted.
    assert 0.2 * 0.05 < loose - exact <= 0.05


@pytest.mark.parametrize("text", ["tv=2", "sigma=-1", "tv", "sigma=a", "lambda=1"])
def test_wrong_words_are_refused(text):
    with pytest.raises(CspdError, match="--relax is"):
        Relaxation.parse(text)


def test_certificates_differ():
    assert "total variation" in Relaxation.parse("tv=0.05").certificate
    assert "the distribution is not guaranteed" in Relaxation.parse("sigma=0.5").certificate
