"""What the relaxed rules guarantee, and that without relaxation nothing changes."""

import pytest
import torch
from mixture import MixtureDenoiser
from test_lossless import CHANNELS, SCHEDULE, step_through, tokens

from cspd.engines.errors import CspdError
from cspd.runtime.coupling import Gaussian, excess_mass
from cspd.runtime.lossless import SpeculativeHead
from cspd.runtime.noise import Noise
from cspd.runtime.relax import Relaxation, TotalVariationRound
from cspd.runtime.rounds import ReferenceRound, Window
from cspd.runtime.speculation import SpeculationOptions


def run(round_session, count=200, window=8):
    head = SpeculativeHead(round_session, SpeculationOptions(window=window), CHANNELS)
    return head(tokens(count), SCHEDULE, Noise(21))


def relaxed(text, **options):
    return run(Relaxation.parse(text).round(MixtureDenoiser()), **options)


def test_no_budget_is_the_exact_rule_to_the_bit():
    exact, other = run(ReferenceRound(MixtureDenoiser())), relaxed("tv=0")
    assert torch.equal(exact.sample, other.sample)


def test_no_tolerance_is_stepping_to_the_bit():
    assert torch.equal(relaxed("sigma=0").sample, step_through(tokens(200), 21).final)


def test_more_tolerance_takes_fewer_rounds_and_strays_further():
    results = [relaxed(f"sigma={amount}") for amount in (0, 0.3, 1, 3)]
    rounds = [result.stats.calls for result in results]
    errors = [(result.sample - results[0].sample).norm().item() for result in results]
    assert rounds == sorted(rounds, reverse=True) and rounds[-1] < rounds[0] / 2
    assert errors == sorted(errors) and errors[1] > 0


def one_step(shift, count):
    """A window of one test for `count` tokens: N(0, 1) drafted as N(shift, 1)."""
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(count, 1, 1, generator=generator)
    zero, one = torch.zeros(count, 1, 1), torch.ones(count, 1, 1)
    drafted = Gaussian(zero + shift, zero, one)
    steps = torch.ones(count, 1, dtype=torch.int32)
    window = Window(steps, zero, drafted.at(noise), noise, drafted)
    log_accept = torch.rand(1, count, generator=generator).log().expand(2, -1)
    return window, Gaussian(zero, zero, one), log_accept


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_total_variation_rule_gives_up_no_more_than_its_share(shift):
    window, target, log_accept = one_step(shift, 200_000)
    inputs = {"log_accept": log_accept, "schedule": torch.zeros(11, 7)}
    exact, loose = (
        TotalVariationRound(None, budget).test(window, target, inputs).float().mean().item()
        for budget in (0.0, 0.5)
    )
    # Level 1e-4: four standard errors of a share of 200,000.
    assert exact == pytest.approx(1 - excess_mass(shift), abs=4 * 0.5 / 200_000**0.5)
    # A budget of 0.5 over ten tests: the law of this one moves by what more is accepted.
    assert 0.2 * 0.05 < loose - exact <= 0.05


@pytest.mark.parametrize("text", ["tv=2", "sigma=-1", "tv", "sigma=a", "lambda=1"])
def test_wrong_words_are_refused(text):
    with pytest.raises(CspdError, match="--relax is"):
        Relaxation.parse(text)


def test_certificates_differ():
    assert "total variation" in Relaxation.parse("tv=0.05").certificate
    assert "nothing is guaranteed about the law" in Relaxation.parse("sigma=0.5").certificate
