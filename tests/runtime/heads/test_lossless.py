"""The speculative head against stepping: identities to the bit, and what it samples.

Statistical tests compare with sequential sampling under another seed: Kolmogorov-Smirnov on 40
projections of the sample and 40 of (an intermediate state, the sample), Bonferroni over the 80, a
permutation test of the energy distance of the joint. Each comparison passes above 1e-3, so that
its false-alarm rate is at most 2e-3; seeds are fixed. Drafts are spoilt on purpose, because a good
draft hides a wrong repair; and every mutant of the method has to fall below 1e-6.
"""

from dataclasses import replace

import coupling
import numpy as np
import pytest
import reference_round
import torch
from chains import (
    LEVEL,
    MIDDLE,
    MUTANT_LEVEL,
    SCHEDULE,
    Sampled,
    network_tokens,
    part_of,
    step_through,
    tokens,
)
from mixture import CHANNELS, MixtureDenoiser
from reference_round import ReferenceRound
from scipy import stats

from cspd.engines.errors import CspdError
from cspd.engines.sessions.session import TorchSession
from cspd.export.graphs.denoiser import DenoiserGraph, denoiser_spec
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import MarConfig
from cspd.runtime.heads.drafts import draft_tables
from cspd.runtime.heads.numbers import ChainNumbers
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.noise import Noise

TOKENS = 8000


class RecordingRound(ReferenceRound):
    """Also keeps the state at step MIDDLE of each token, which its condition numbers."""

    def __init__(self, denoiser, count):
        super().__init__(denoiser)
        self.middle = torch.full((count, CHANNELS), torch.nan)

    def accept(self, window, target, t):
        last = super().accept(window, target, t)
        offset = torch.arange(window.steps.shape[1])
        on_path = (window.steps == MIDDLE) & (offset <= last[:, None]) & (t["step"][:, None] >= 0)
        token, row = on_path.nonzero(as_tuple=True)
        self.middle[t["conditions"][0, token, 1].long()] = window.states[token, row]
        return last


def speculate(rows, seed, denoiser=None, **options):
    recording = RecordingRound(denoiser or MixtureDenoiser(), len(rows.images))
    head = SpeculativeHead(recording, SpeculationOptions(**options), CHANNELS)
    sampled = head(rows, SCHEDULE, Noise(seed))
    return Sampled(sampled.sample, recording.middle, sampled.sum_log_std), sampled.stats


def projected(a, b):
    """Smallest p-value of 40 random projections, times 40."""
    directions = torch.randn(a.shape[1], 40, generator=torch.Generator().manual_seed(9))
    columns = zip((a @ directions).T.numpy(), (b @ directions).T.numpy(), strict=True)
    return 40 * min(stats.ks_2samp(*column).pvalue for column in columns)


def energy(a, b, size=750, permutations=1999):
    """Permutation p-value of the energy distance of the first `size` rows of each."""
    both = torch.cat([a[:size], b[:size]])
    distance = torch.cdist(both, both)
    generator = torch.Generator().manual_seed(8)
    order = torch.rand(permutations, 2 * size, generator=generator).argsort(1)
    sign = torch.cat([torch.arange(2 * size)[None], order]) < size
    sign = sign.float() * 2 - 1
    statistic = -((sign @ distance) * sign).sum(1)
    return (statistic >= statistic[0]).float().mean().item()


def marginal_p_value(a, b):
    """Smallest p-value of all 80 projections after Bonferroni."""
    return 2 * min(projected(a.final, b.final), projected(a.joint, b.joint))


def p_value(a, b):
    """Smallest corrected p-value of the comparison; its false-alarm rate at level l is 2 l."""
    return min(marginal_p_value(a, b), energy(a.joint, b.joint))


@pytest.fixture(scope="module")
def sequential():
    return step_through(tokens(TOKENS), seed=100)


def spoil(monkeypatch):
    """Draft from a shifted and widened kernel instead of the frozen one."""
    good = reference_round.draft

    def bad(x, step, x0, fraction, *rest):
        return good(x, step, x0 + 0.3, fraction + 1.0, *rest)

    monkeypatch.setattr(reference_round, "draft", bad)


def test_window_of_one_is_stepping_to_the_bit():
    rows = tokens(40)
    for count in (1, 40):
        part = part_of(rows, torch.arange(count))
        expected = step_through(part, seed=3)
        sampled, counts = speculate(part, 3, window=1)
        assert torch.equal(sampled.final, expected.final)
        assert torch.equal(sampled.middle, expected.middle)
        assert torch.equal(sampled.sum_log_std, expected.sum_log_std)
        assert counts.rounds == SCHEDULE.num_steps and counts.rows == count * SCHEDULE.num_steps
        assert counts.tested.sum() == 0 and counts.draws == 0


def test_draft_table_unrolls_the_recurrence():
    table, window, start = SCHEDULE.table.double(), 6, 9
    x, x0, noise = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(0)).double()
    scaled = noise * torch.linspace(0.5, 2, window)[:, None]
    tables = draft_tables(SCHEDULE, window)
    state, added = tables["draft_state"][start].double(), tables["draft_noise"][start].double()
    states, means = state @ torch.stack([x, x0]) + added @ scaled
    for j in range(window):
        torch.testing.assert_close(x, states[j], rtol=1e-5, atol=1e-5)
        mean = table[start - j, 3] * x0 + table[start - j, 4] * x
        torch.testing.assert_close(mean, means[j], rtol=1e-5, atol=1e-5)
        x = mean + scaled[j]


class PointDenoiser(MixtureDenoiser):
    """All data at 0: the very first draft, the centre of the data, is the target's kernel."""

    def __call__(self, *, x, step, schedule, **_):
        row = schedule[step]
        mean_x, low, high = row[:, 4:5], row[:, 5:6], row[:, 6:7]
        zero = torch.zeros_like(x)
        log_std = (0.5 * low + 0.5 * high).expand_as(x)
        return {"mean": mean_x * x, "log_std": log_std, "x0": zero, "fraction": zero + 0.5}


@pytest.mark.parametrize("window", [4, 7, 16])
def test_draft_equal_to_target_is_always_accepted(window):
    rows = tokens(20)
    sampled, counts = speculate(rows, 5, PointDenoiser(), window=window)
    steps = SCHEDULE.num_steps
    assert counts.rounds == -(-steps // window) and counts.draws == 0
    assert np.array_equal(counts.tested, counts.accepted)
    assert counts.rows == 20 * steps
    # The same noise takes the same path: rounding is all that differs.
    expected = step_through(rows, 5, PointDenoiser())
    torch.testing.assert_close(sampled.final, expected.final, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampled.sum_log_std, expected.sum_log_std, rtol=1e-5, atol=1e-5)


def test_broken_draft_is_never_accepted(monkeypatch, sequential):
    good = reference_round.draft

    def broken(*args):
        window = good(*args)
        states = torch.cat([window.states[:, :1], window.states[:, 1:] * torch.nan], dim=1)
        kernel = replace(window.kernel, mean=window.kernel.mean * torch.nan)
        return replace(window, states=states, reached=window.reached * torch.nan, kernel=kernel)

    monkeypatch.setattr(reference_round, "draft", broken)
    sampled, counts = speculate(tokens(TOKENS), 6, window=4)
    assert counts.accepted.sum() == 0
    assert counts.rounds == SCHEDULE.num_steps
    assert p_value(sampled, sequential) > LEVEL


def test_temperature_zero_is_the_deterministic_chain():
    rows = tokens(30, temperature=0.0)
    sampled, counts = speculate(rows, 1, window=5)
    assert counts.accepted.sum() == 0
    assert torch.equal(sampled.final, step_through(rows, 1).final)


def test_counts_add_up():
    _, counts = speculate(tokens(200), 4, window=6)
    assert (counts.accepted <= counts.tested).all() and (counts.tested <= 200).all()
    assert counts.tested[0] == 0
    assert counts.accepted.sum() > 0.3 * counts.tested.sum() > 0
    # Every refusal took at least one draw.
    assert counts.draws >= (counts.tested - counts.accepted).sum()
    assert counts.tokens == 200 and counts.calls == counts.rounds < SCHEDULE.num_steps


@pytest.mark.parametrize(
    ("window", "guidance", "temperature"), [(8, 1.5, 1.0), (16, 1.0, 1.0), (4, 3.0, 0.8)]
)
def test_law_is_that_of_stepping(window, guidance, temperature):
    rows = tokens(TOKENS, guidance, temperature)
    sampled, counts = speculate(rows, 11, window=window)
    assert counts.rounds < SCHEDULE.num_steps
    assert p_value(sampled, step_through(rows, 12)) > LEVEL


@pytest.mark.parametrize("candidates", [1, 16])
def test_law_with_spoilt_drafts(monkeypatch, sequential, candidates):
    spoil(monkeypatch)
    sampled, counts = speculate(
        tokens(TOKENS), 13, window=SCHEDULE.num_steps, candidates=candidates
    )
    assert 0.2 < counts.accepted.sum() / counts.tested.sum() < 0.8
    assert p_value(sampled, sequential) > LEVEL


def test_stepping_differs_from_itself_by_chance_alone(sequential):
    # p-values of sequential runs against each other: uniform, so not all tiny and not all large.
    final = [step_through(tokens(1000), seed).final[:, 0].numpy() for seed in range(200, 220)]
    values = [stats.ks_2samp(sequential.final[:, 0].numpy(), f).pvalue for f in final]
    assert stats.kstest(values, "uniform").pvalue > LEVEL


class Unguided(MixtureDenoiser):
    def __call__(self, *, guidance, **inputs):
        return super().__call__(guidance=torch.ones_like(guidance), **inputs)


class OneStepOff(MixtureDenoiser):
    def __call__(self, *, step, **inputs):
        return super().__call__(step=(step - 1).clamp(min=0), **inputs)


def draw_from_target(target, drafted, noise, choices):
    return target.at(noise[:, 0]), torch.zeros(len(noise), dtype=torch.int64)


def swapped(log_ratio):
    def mutant(numerator, source, x, noise):
        crossed = (
            replace(a, std=b.std, log_std=b.log_std)
            for a, b in ((numerator, source), (source, numerator))
        )
        return log_ratio(*crossed, x, noise)

    return mutant


def without_determinant(log_ratio):
    def mutant(numerator, source, x, noise):
        zero = torch.zeros_like(x)
        flat = (replace(g, log_std=zero) for g in (numerator, source))
        return log_ratio(*flat, x, noise)

    return mutant


class OneNumberForAllTests(ChainNumbers):
    def tests(self, *args):
        return super().tests(*args)[:1].expand(SCHEDULE.num_steps, -1).contiguous()


def keep_all(envelope, noise, uniform):
    return torch.ones(noise.shape[:2], dtype=torch.bool)


MUTANTS = {
    "resample from the target": (coupling, "residual", lambda _: draw_from_target),
    "standard deviations swapped": (coupling, "log_ratio", swapped),
    "no log determinant": (coupling, "log_ratio", without_determinant),
    "every candidate of the bound kept": (coupling.Envelope, "keep", lambda _: keep_all),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_coupling_is_caught(monkeypatch, sequential, name):
    spoil(monkeypatch)
    owner, function, mutate = MUTANTS[name]
    monkeypatch.setattr(owner, function, mutate(getattr(owner, function)))
    sampled, _ = speculate(tokens(TOKENS), 15, window=SCHEDULE.num_steps)
    assert marginal_p_value(sampled, sequential) < MUTANT_LEVEL


def test_reused_uniform_numbers_are_caught(monkeypatch, sequential):
    spoil(monkeypatch)
    options = SpeculationOptions(window=SCHEDULE.num_steps)
    recording = RecordingRound(MixtureDenoiser(), TOKENS)
    head = SpeculativeHead(recording, options, CHANNELS, OneNumberForAllTests)
    final = head(tokens(TOKENS), SCHEDULE, Noise(15)).sample
    sampled = Sampled(final, recording.middle)
    assert marginal_p_value(sampled, sequential) < MUTANT_LEVEL


@pytest.mark.parametrize("denoiser", [Unguided, OneStepOff])
def test_wrong_call_of_the_head_is_caught(sequential, denoiser):
    sampled, _ = speculate(tokens(TOKENS), 15, denoiser(), window=8)
    assert marginal_p_value(sampled, sequential) < MUTANT_LEVEL


@pytest.fixture(scope="module")
def network():
    """A small random diffusion head as a `denoiser` session."""
    torch.manual_seed(0)
    config = MarConfig(4, 24, 1, 1, 2, head_width=40, head_depth=2, token_dim=CHANNELS)
    graph = DenoiserGraph(DiffusionLoss(config))
    return TorchSession(denoiser_spec(config, 256), graph, torch.device("cpu"))


def test_with_one_bucket_a_token_does_not_depend_on_its_batch(network):
    options = SpeculationOptions(window=6, row_buckets=(24,))
    shapes = set()

    def watched(**inputs):
        shapes.add(tuple(tuple(value.shape) for value in inputs.values()))
        return network(**inputs)

    head = SpeculativeHead(ReferenceRound(watched), options, CHANNELS)
    rows = network_tokens(11)
    together = head(rows, SCHEDULE, Noise(0))
    for index in (torch.tensor([3]), torch.tensor([9, 2]), torch.arange(10, -1, -1)):
        alone = head(part_of(rows, index), SCHEDULE, Noise(0))
        for name in ("sample", "mean", "log_std", "sum_log_std"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[index])
    assert len(shapes) == 1
    assert together.stats.rows == 24 * together.stats.calls


def test_no_call_has_more_rows_than_the_session_takes(network):
    options = SpeculationOptions(window=4, max_rows=14)
    sizes = []

    def watched(**inputs):
        sizes.append(len(inputs["x"]))
        return network(**inputs)

    sampled = SpeculativeHead(ReferenceRound(watched), options, CHANNELS)(
        network_tokens(8), SCHEDULE, Noise(0)
    )
    assert max(sizes) == 12 and len(sampled.sample) == 8
    # Three chunks: all their calls are counted, the rounds are those of the slowest.
    assert sampled.stats.calls == len(sizes) > sampled.stats.rounds
    assert sampled.stats.rows == sum(sizes)


def test_row_counts_are_those_of_the_buckets(network):
    sizes = []

    def watched(**inputs):
        sizes.append((inputs["conditions"].shape[1], len(inputs["x"])))
        return network(**inputs)

    options = SpeculationOptions(window=4, row_buckets=(4, 16, 32))
    SpeculativeHead(ReferenceRound(watched), options, CHANNELS)(
        network_tokens(9), SCHEDULE, Noise(0)
    )
    # Nine tokens: a chunk of eight, whose tokens finish one by one, and one alone.
    assert sizes[0] == (8, 32) and sizes[-1] == (1, 4)
    assert {tokens for tokens, _ in sizes} <= {8, 4, 1} and {rows for _, rows in sizes} <= {
        32,
        16,
        4,
    }


def test_options_are_checked_in_the_words_of_the_user():
    with pytest.raises(CspdError, match="window 0"):
        SpeculationOptions(window=0)
    with pytest.raises(CspdError, match="call of 4 rows cannot hold"):
        SpeculationOptions(window=8, row_buckets=(4, 64))
    with pytest.raises(CspdError, match="call of 7 rows cannot hold"):
        SpeculationOptions(window=8, max_rows=7)
