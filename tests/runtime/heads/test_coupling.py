"""Acceptance and residual against quadrature and closed forms.

False alarms: every statistical test is at level 1e-3 after Bonferroni over its whole grid and runs
on fixed seeds, so that each either always passes or always fails on one machine.
"""

import itertools
import math
from dataclasses import replace

import coupling
import numpy as np
import pytest
import torch
from coupling import Gaussian
from scipy import stats

LEVEL = 1e-3
DRAWS = 20_000
GRID = list(itertools.product((0.0, 0.5, 1.0, 2.0, 4.0, 6.0), (0.5, 1.0, 2.0)))


def kernel(mean, log_std, temperature=1.0, rows=1):
    mean, log_std = (torch.tensor(v, dtype=torch.float32).expand(rows, -1) for v in (mean, log_std))
    return Gaussian.kernel(mean, log_std, torch.full((rows,), temperature))


def couple(target, drafted, rows, seed=0):
    """Values of the coupling, and whether the draft was kept, for `rows` independent draws."""
    generator = torch.Generator().manual_seed(seed)
    channels = target.mean.shape[-1]
    noise = torch.randn(rows, channels, generator=generator)
    draft = drafted.at(noise)
    ratio = coupling.log_ratio(target, drafted, draft, noise)
    kept = coupling.accept(torch.rand(rows, generator=generator).log(), ratio)
    values, missing = draft.clone(), ~kept
    while missing.any():
        at = missing.nonzero()[:, 0]
        part = [
            Gaussian(*(v.expand(rows, -1)[at] for v in vars(g).values())) for g in (target, drafted)
        ]
        candidates = torch.randn(len(at), 8, channels, generator=generator)
        choices = torch.rand(len(at), 8, 3, generator=generator)
        choices[..., 1] = -2 * choices[..., 1].log()
        found, index = coupling.residual(*part, candidates, choices)
        solved = at[index < 8]
        values[solved] = found[index < 8]
        missing[solved] = False
    return values, kept


def overlap(shift, ratio):
    """1 - total variation of N(0, 1) and N(shift, ratio^2), by quadrature."""
    grid = np.linspace(-40, 40, 400_001)
    low = np.minimum(stats.norm.pdf(grid), stats.norm.pdf(grid, shift, ratio))
    return float(low.sum() * (grid[1] - grid[0]))


@pytest.mark.parametrize(("shift", "ratio"), GRID)
def test_law_and_acceptance_in_one_dimension(shift, ratio):
    target, drafted = kernel([0.0], [0.0]), kernel([shift], [math.log(ratio)])
    values, kept = couple(target, drafted, DRAWS)
    level = LEVEL / (2 * len(GRID))
    assert stats.kstest(values[:, 0].numpy(), "norm").pvalue > level
    expected = overlap(shift, ratio)
    if expected > 1 - 1e-6:
        assert kept.all()
    else:
        assert stats.binomtest(int(kept.sum()), DRAWS, expected).pvalue > level


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_law_in_several_dimensions(temperature):
    target = kernel([0.0, 1.0, -1.0], [-1.0, 0.3, 0.0], temperature)
    drafted = kernel([0.4, 1.2, -1.5], [-0.7, 0.0, 0.2], temperature)
    values, kept = couple(target, drafted, DRAWS)
    assert 0.1 < kept.float().mean() < 0.9
    score = ((values - target.mean) / target.std).numpy()
    # Three coordinates, their sum and the log density: five tests for each of two temperatures.
    samples = [(score[:, i], stats.norm()) for i in range(3)]
    samples += [(score.sum(1), stats.norm(0, 3**0.5)), ((score**2).sum(1), stats.chi2(3))]
    for sample, expected in samples:
        assert stats.kstest(sample, expected.cdf).pvalue > LEVEL / 10


def test_log_ratio_is_that_of_the_densities():
    generator = torch.Generator().manual_seed(3)
    mean, log_std, other_mean, other_log_std, noise = torch.randn(5, 7, 4, generator=generator)
    temperature = torch.rand(7, generator=generator) + 0.5
    target = Gaussian.kernel(mean, log_std, temperature)
    drafted = Gaussian.kernel(other_mean, other_log_std, temperature)
    x = drafted.at(noise)
    density = [
        torch.distributions.Normal(g.mean, g.std).log_prob(x).sum(-1) for g in (target, drafted)
    ]
    torch.testing.assert_close(
        coupling.log_ratio(target, drafted, x, noise), density[0] - density[1], rtol=1e-4, atol=1e-4
    )


def test_equal_kernels_accept_every_draft():
    target = kernel([0.3, -2.0], [-5.0, 0.1], rows=1000)
    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    # Equal up to the rounding of x - mean: 1e-4 of the smaller standard deviation.
    ratio = coupling.log_ratio(target, target, target.at(noise), noise)
    assert ratio.abs().max() < 1e-3
    assert coupling.accept(torch.full((1000,), math.log(0.998)), ratio).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_draft_is_refused_and_replaced_by_the_target(broken):
    target, drafted = kernel([0.0, 0.0], [0.0, 0.0]), kernel([broken, 0.0], [0.0, 0.0])
    noise = torch.zeros(1, 2)
    ratio = coupling.log_ratio(target, drafted, drafted.at(noise), noise)
    assert not coupling.accept(torch.tensor([-1e30]), ratio).any()
    values, index = coupling.residual(
        target, drafted, torch.ones(1, 3, 2), torch.full((1, 3, 3), 0.5)
    )
    assert index.item() == 0 and torch.equal(values, torch.ones(1, 2))


def test_broken_target_shows_in_the_sample_at_once():
    target, drafted = kernel([math.nan], [0.0]), kernel([0.0], [0.0])
    values, index = coupling.residual(
        target, drafted, torch.ones(1, 3, 1), torch.full((1, 3, 3), 0.5)
    )
    assert index.item() == 0 and values.isnan().all()


def test_residual_reports_the_first_kept_candidate_or_none():
    # So far apart that candidates are draws from the target; (p - q)+ lives below 3.
    target, drafted = kernel([0.0], [0.0], rows=3), kernel([6.0], [0.0], rows=3)
    candidates = torch.tensor([[4.0, -3.0, -4.0], [-3.0, 4.0, 4.0], [4.0, 5.0, 6.0]])[..., None]
    choices = torch.full((3, 3, 3), 0.5)
    values, index = coupling.residual(target, drafted, candidates, choices)
    assert index.tolist() == [1, 0, 3]
    assert values[:2, 0].tolist() == [-3.0, -3.0]


def residual_cdf(shift, ratio):
    """Distribution function of (p - q)+ of N(0, 1) and N(shift, ratio^2), by quadrature."""
    grid = np.linspace(-12, 12, 240_001)
    mass = np.maximum(stats.norm.pdf(grid) - stats.norm.pdf(grid, shift, ratio), 0).cumsum()
    return lambda x: np.interp(x, grid, mass / mass[-1])


def draw_residual(shift, ratio):
    """Draws of the residual of N(0, 1) and N(shift, ratio^2), and the index of each."""
    target, drafted = kernel([0.0], [0.0], rows=DRAWS), kernel([shift], [math.log(ratio)])
    drafted = Gaussian(*(value.expand(DRAWS, -1) for value in vars(drafted).values()))
    generator = torch.Generator().manual_seed(4)
    choices = torch.rand(DRAWS, 32, 3, generator=generator)
    choices[..., 1] = -2 * choices[..., 1].log()
    noise = torch.randn(DRAWS, 32, 1, generator=generator)
    values, index = coupling.residual(target, drafted, noise, choices)
    return values[:, 0].numpy(), index


@pytest.mark.parametrize("shift", [0.01, 0.3, 1.5])
@pytest.mark.parametrize("ratio", [0.7, 0.99, 1.01, 1.5])
def test_residual_law_and_its_cost(shift, ratio):
    # The residual alone, which a test of the whole coupling sees only as often as it refuses.
    values, index = draw_residual(shift, ratio)
    assert (index < 32).all()
    assert stats.kstest(values, residual_cdf(shift, ratio)).pvalue > LEVEL / 12
    # However close the kernels are: draws from the target would take 250 at a shift of 0.01.
    assert (index + 1).double().mean() < 4


def change_weights(method, change):
    def mutant(envelope, *args):
        weights = change(envelope.weights.clone())
        return method(replace(envelope, weights=weights), *args)

    return mutant


def without(column):
    def change(weights):
        weights[:, column] = 0
        return weights

    return change


MUTANTS = {
    "no constant": ("draw", without(0)),
    "no linear term": ("draw", without(1)),
    "no squares": ("draw", without(2)),
    "bound too low": ("keep", lambda weights: 0.5 * weights),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_bound_is_caught(monkeypatch, name):
    method, change = MUTANTS[name]
    original = getattr(coupling.Envelope, method)
    monkeypatch.setattr(coupling.Envelope, method, change_weights(original, change))
    # Wider than the draft, so that all three terms matter; narrower, for the constant.
    worst = min(
        stats.kstest(draw_residual(shift, ratio)[0], residual_cdf(shift, ratio)).pvalue
        for shift, ratio in ((0.3, 0.9), (0.3, 1.2))
    )
    assert worst < 1e-6


def test_bound_is_above_the_residual():
    generator = torch.Generator().manual_seed(5)
    mean, log_std, other_mean, other_log_std = 0.2 * torch.randn(4, 300, 6, generator=generator)
    one = torch.ones(300)
    target, drafted = (
        Gaussian.kernel(mean, log_std, one),
        Gaussian.kernel(other_mean, other_log_std, one),
    )
    envelope = coupling.Envelope.of(target, drafted)
    noise = 2 * torch.randn(300, 200, 6, generator=generator)
    assert 10 < (envelope.weights[:, 0] < 1).sum()
    # A uniform number of 1 is refused everywhere: nothing sticks out of the bound.
    assert not envelope.keep(noise, torch.full((300, 200), 1.0001)).any()
