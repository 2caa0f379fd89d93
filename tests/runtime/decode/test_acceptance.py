"""The acceptance test and its residual: closed forms, brute force, identities, damaged inputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cspd.runtime.decode.acceptance import accept, accept_log_ratio, log_density, resample
from cspd.runtime.heads.base import HeadSample
from cspd.runtime.noise import Noise, Purpose

TEMPERATURES = [1.0, 42.0, 0.3]
finite = st.floats(-20, 20, width=32)
anything = st.floats(width=32, allow_nan=True, allow_infinity=True)


def head_sample(mean, log_std, sum_log_std=0.0) -> HeadSample:
    mean = torch.as_tensor(mean, dtype=torch.float32)
    log_std, total = (
        torch.as_tensor(v, dtype=torch.float32).expand_as(mean) for v in (log_std, sum_log_std)
    )
    return HeadSample(mean, mean, log_std, total)


def random_head(seed: int, *shape: int) -> HeadSample:
    generator = torch.Generator().manual_seed(seed)
    mean, log_std, total = (torch.randn(shape, generator=generator) for _ in range(3))
    return HeadSample(mean, mean, log_std, total)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_log_density_is_that_of_a_gaussian(temperature):
    p = random_head(0, 5, 16)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    scale = temperature * p.log_std.double().exp()
    exact = stats.norm.logpdf(x.double(), p.mean.double(), scale).sum(-1)
    constant = 16 * (-0.5 * math.log(2 * math.pi) - math.log(temperature))
    got = log_density(x, p.mean, p.log_std, temperature).double().numpy() + constant
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("seed", range(5))
def test_ratio_is_that_of_the_densities_along_two_aligned_chains(temperature, seed):
    """Brute force: products of normal densities, step by step, with shared noise (D1)."""
    rng = np.random.default_rng(seed)
    steps, channels = 4, 3
    std = {who: rng.uniform(0.3, 2, (steps, channels)) for who in "pq"}
    mean = {who: rng.normal(size=(steps, channels)) for who in "pq"}
    noise = rng.normal(size=(steps, channels))
    drafted_token = mean["q"][0]  # the last step adds no noise
    density = {}
    for who in "pq":
        along_path = mean[who][1:] + std[who][1:] * noise[1:]
        path = stats.norm.pdf(along_path, mean[who][1:], std[who][1:]).prod()
        last = stats.norm.pdf(drafted_token, mean[who][0], temperature * std[who][0]).prod()
        density[who] = path * last
    heads = {
        who: head_sample(mean[who][:1], np.log(std[who][:1]), np.log(std[who][1:]).sum(0)[None])
        for who in "pq"
    }
    ratio = accept_log_ratio(heads["q"].sample, heads["q"], heads["p"], temperature)
    assert ratio.item() == pytest.approx(math.log(density["p"] / density["q"]), abs=1e-4)


def test_sign_of_the_sigma_ratio():
    """A target that was surer than the draft along the chain accepts more, and vice versa (D1)."""
    x = torch.zeros(1, 2)
    draft = head_sample([[0.0, 0.0]], 0.0, 1.0)
    for total, expected in ((0.5, 1.0), (1.0, 0.0), (2.0, -2.0)):
        target = head_sample([[0.0, 0.0]], 0.0, total)
        assert accept_log_ratio(x, draft, target, 1.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equal_models_accept_everything(temperature):
    model = random_head(3, 200, 16)
    ratio = accept_log_ratio(model.sample, model, model, temperature)
    assert torch.equal(ratio, torch.zeros(200))
    # Every number that the generator can return, the largest and smallest among them.
    uniform = torch.linspace(2.0**-24, 1 - 2.0**-24, 200)
    assert accept(ratio, uniform).all()


@given(log_ratio=st.floats(-30, 30, width=32), uniform=st.integers(0, 2**23 - 1))
def test_acceptance_probability_is_min_one_ratio(log_ratio, uniform):
    u = (uniform + 0.5) / 2**23
    accepted = bool(accept(torch.tensor([log_ratio]), torch.tensor([u])))
    margin = math.log(u) - min(0.0, log_ratio)
    if abs(margin) > 1e-5:
        assert accepted == (margin < 0)
    if log_ratio >= 0:
        assert accepted


@given(st.lists(anything, min_size=14, max_size=14), st.sampled_from(TEMPERATURES))
def test_nothing_that_is_not_finite_is_accepted(numbers, temperature):
    """Whatever the networks return: the ratio is a number or -inf, the verdict is defined (D4)."""
    values = torch.tensor(numbers).reshape(7, 1, 2)
    x, draft, target = (
        values[0],
        HeadSample(*values[[1, 1, 2, 3]]),
        HeadSample(*values[[4, 4, 5, 6]]),
    )
    ratio = accept_log_ratio(x, draft, target, temperature)
    assert bool((ratio.isfinite() | (ratio == -torch.inf)).all())
    if not values.isfinite().all():
        # A NaN anywhere reaches the ratio; infinite parts do unless they cancel to a finite one.
        assert not values.isnan().any() or ratio.item() == -torch.inf
    if ratio.item() == -torch.inf:
        assert not accept(ratio, torch.tensor([2.0**-24])).item()


@pytest.mark.parametrize("channels", [16, 64, 1024])
@pytest.mark.parametrize("log_std", [-40.0, 40.0])
def test_densities_that_underflow_do_not_matter(channels, log_std):
    """prod(std) is 0 or infinite in float32; the ratio of equal laws is 1 all the same (D4)."""
    assert torch.tensor(channels * log_std).exp().item() in (0.0, math.inf)
    draft = head_sample(torch.zeros(1, channels), log_std)
    # The target is twice as wide: log ratio at the common mean is -channels log 2.
    target = head_sample(torch.zeros(1, channels), log_std + math.log(2))
    assert accept_log_ratio(draft.sample, draft, draft, 1.0).item() == 0
    ratio = accept_log_ratio(draft.sample, draft, target, 1.0).item()
    assert ratio == pytest.approx(-channels * math.log(2), rel=1e-4)


def keep_probability(x, drafted, target, temperature: float, guess: float) -> tuple[bool, bool]:
    """Whether a candidate `x` is kept for a uniform number just below and just above `guess`."""
    normal = ((x - target.mean) / (temperature * target.log_std.exp()))[None]
    kept = []
    for uniform in (guess * (1 - 1e-3), guess * (1 + 1e-3) + 1e-9):
        found = resample(drafted, target, temperature, normal, torch.full((1, 1), uniform)).found
        kept.append(bool(found))
    return kept[0], kept[1]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("log_sigma", [-1.0, 0.0, 0.7])
def test_accepted_and_resampled_mass_are_complementary(temperature, log_sigma):
    """In one dimension, on a grid: both use the same densities at the same temperature (D3).

    With r = Sigma p / q, the test keeps min(1, r) of the draft's mass and the residual keeps
    max(0, 1 - 1 / r) of the target's: one of the two is trivial everywhere, and
    q min(1, r) + Sigma p max(0, 1 - 1 / r) = Sigma p.
    """
    drafted, target = head_sample([[0.2]], 0.1, log_sigma), head_sample([[-0.5]], -0.4, 0.0)
    # Stay where float32 resolves the ratio.
    for x in np.linspace(-3, 3, 61) * temperature:
        p = stats.norm.pdf(x, -0.5, temperature * math.exp(-0.4))
        q = stats.norm.pdf(x, 0.2, temperature * math.exp(0.1))
        ratio = math.exp(log_sigma) * p / q
        point = torch.tensor([[x]], dtype=torch.float32)
        got = accept_log_ratio(point, drafted, target, temperature).item()
        assert got == pytest.approx(math.log(ratio), abs=1e-3)
        if abs(math.log(ratio)) < 2e-2:
            continue
        keep = max(0.0, 1 - 1 / ratio)
        below, above = keep_probability(point, drafted, target, temperature, keep)
        assert below == (ratio > 1) and not above
        mass = q * min(1, ratio) + math.exp(log_sigma) * p * keep
        assert mass == pytest.approx(math.exp(log_sigma) * p, rel=1e-9)


def one_dimensional_run(accept_temperature: float, residual_temperature: float) -> np.ndarray:
    """20,000 tokens: drawn from the draft's N(0.6, 1.3), tested, and replaced if rejected."""
    count, tries = 20_000, 200
    noise, index = Noise(11), torch.arange(20_000)
    zero = torch.zeros((), dtype=torch.int64)
    drafted, target = (
        head_sample(torch.full((count, 1), mean), math.log(std))
        for mean, std in ((0.6, 1.3), (0, 1))
    )
    x = 0.6 + 1.3 * noise.normal(Purpose.DENOISE, index, zero, zero, 1)
    uniform = noise.uniform(Purpose.ACCEPT, index, zero, zero)[:, 0]
    kept = accept(accept_log_ratio(x, drafted, target, accept_temperature), uniform)
    attempt = torch.arange(tries)[:, None]
    drawn = resample(
        drafted, target, residual_temperature,
        noise.normal(Purpose.RESAMPLE, index, zero, attempt, 1),
        noise.uniform(Purpose.RESAMPLE_ACCEPT, index, zero, attempt)[..., 0],
    )  # fmt: skip
    assert 0.1 < kept.float().mean() and drawn.found.all()
    return torch.where(kept[:, None], x, drawn.values)[:, 0].numpy()


def test_on_one_common_space_the_output_follows_the_target():
    """Kolmogorov-Smirnov at level 1e-4 with a fixed seed; exact where Sigma = T = 1."""
    assert stats.kstest(one_dimensional_run(1.0, 1.0), "norm").pvalue > 1e-4


def test_different_densities_in_test_and_residual_would_show():
    """The mutant of D3, a test at T = 42 with a residual at T = 1, must fail the test above."""
    assert stats.kstest(one_dimensional_run(42.0, 1.0), "norm").pvalue < 1e-10


def test_first_success_counts():
    drafted, target = head_sample([[0.0]], 0.0, -50.0), head_sample([[0.0]], 0.0)
    # Sigma = e^-50: no mass in the residual. Sigma = e^50: everything is kept.
    sure = HeadSample(drafted.sample, drafted.mean, drafted.log_std, torch.tensor([[50.0]]))
    normal = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    uniform = torch.tensor([[1.0 - 2.0**-24], [0.5], [0.5]])
    none = resample(drafted, target, 1.0, normal, uniform)
    assert not none.found.any() and torch.equal(none.values, torch.zeros(1, 1))
    first = resample(sure, target, 1.0, normal, uniform * 0.9)
    assert first.found.all() and first.values.item() == 1.0


def test_identical_last_kernels_with_smaller_path_density_have_no_residual():
    """The case where released code returned zeros for half of all tokens (D2): say not found."""
    drafted, target = random_head(0, 50, 16), random_head(0, 50, 16)
    drafted = HeadSample(drafted.sample, drafted.mean, drafted.log_std, target.sum_log_std - 0.05)
    normal = torch.randn(100, 50, 16, generator=torch.Generator().manual_seed(0))
    drawn = resample(drafted, target, 1.0, normal, torch.full((100, 50), 2.0**-24))
    assert not drawn.found.any()


@given(st.lists(anything, min_size=12, max_size=12))
def test_resampling_from_damaged_kernels_never_finds_a_broken_token(numbers):
    values = torch.tensor(numbers).reshape(6, 1, 2)
    draft, target = HeadSample(*values[[0, 0, 1, 2]]), HeadSample(*values[[3, 3, 4, 5]])
    normal = torch.tensor([[[0.5, -0.5]], [[1.0, 2.0]]])
    drawn = resample(draft, target, 1.0, normal, torch.full((2, 1), 0.5))
    assert not drawn.found.item() or drawn.values.isfinite().all()
