"""The loop in one call against the rounds of the reference: the same samples, to the bit."""

import pytest
import torch
from chains import CHANNELS, SCHEDULE, network_tokens, part_of
from quiet_head import quiet_head
from reference_round import ReferenceRound

from cspd.engines.sessions.session import TorchSession
from cspd.export.graphs.denoiser import DenoiserGraph, denoiser_spec
from cspd.export.graphs.speculative_loop import SpeculativeLoopGraph, speculative_loop_spec
from cspd.export.mar.presets import MarConfig
from cspd.runtime.heads import speculative_loop as lossless_loop
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import RESULTS, SpeculativeHead
from cspd.runtime.heads.speculative_loop import SpeculativeLoopHead
from cspd.runtime.noise import Noise

CONFIG = MarConfig(4, 24, 1, 1, 2, head_width=40, head_depth=2, token_dim=CHANNELS)
CPU = torch.device("cpu")


class Counting:
    """A session that keeps how many tokens its calls have."""

    def __init__(self, session):
        self.session, self.spec, self.device, self.sizes = session, session.spec, CPU, []

    def __call__(self, **tensors):
        self.sizes.append(len(tensors["x"]))
        return self.session(**tensors)


@pytest.fixture(scope="module")
def diffloss():
    return quiet_head(CONFIG, seed=0)


@pytest.fixture
def loop(diffloss):
    spec = speculative_loop_spec(CONFIG, 64)
    return Counting(TorchSession(spec, SpeculativeLoopGraph(diffloss), CPU))


@pytest.fixture
def rounds(diffloss):
    return ReferenceRound(TorchSession(denoiser_spec(CONFIG, 512), DenoiserGraph(diffloss), CPU))


@pytest.mark.parametrize("options", [{"window": 6}, {"window": 1}, {"window": 16}])
def test_same_samples_and_counts_as_the_rounds(loop, rounds, options):
    options = SpeculationOptions(**options)
    rows = network_tokens(11)
    expected = SpeculativeHead(rounds, options, CHANNELS)(rows, SCHEDULE, Noise(5))
    got = SpeculativeLoopHead(loop, options)(rows, SCHEDULE, Noise(5))
    for name in RESULTS:
        # Finished tokens leave the calls of the rounds, and the shapes of products change.
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), msg=name)
    assert loop.sizes == [11]
    for name in ("tokens", "rounds", "calls", "draws"):
        assert getattr(got.stats, name) == getattr(expected.stats, name)
    assert (got.stats.tested == expected.stats.tested).all()
    assert (got.stats.accepted == expected.stats.accepted).all()
    # Finished tokens cost one row a round here.
    assert expected.stats.rows <= got.stats.rows <= expected.stats.rows + 11 * got.stats.rounds


def test_few_candidates_take_more_calls_and_give_the_same(loop, monkeypatch):
    options, rows = SpeculationOptions(window=8), network_tokens(9)
    at_once = SpeculativeLoopHead(loop, options)(rows, SCHEDULE, Noise(5))
    monkeypatch.setattr(lossless_loop, "POOL", 8)
    pieces = SpeculativeLoopHead(loop, options)(rows, SCHEDULE, Noise(5))
    assert len(loop.sizes) > 3
    for name in RESULTS:
        assert torch.equal(getattr(pieces, name), getattr(at_once, name))
    assert (pieces.stats.tested == at_once.stats.tested).all()
    assert pieces.stats.draws == at_once.stats.draws


def test_calls_are_cut_to_the_memory_of_the_modulations(loop):
    options, rows = SpeculationOptions(window=4), network_tokens(10)
    whole = SpeculativeLoopHead(loop, options)(rows, SCHEDULE, Noise(2))
    token = 4 * loop.spec.scratch * SCHEDULE.num_steps * 2
    cut = SpeculativeLoopHead(loop, options, memory=3 * token)(rows, SCHEDULE, Noise(2))
    assert loop.sizes == [10, 3, 3, 3, 1]
    torch.testing.assert_close(cut.sample, whole.sample)
    assert cut.stats.calls > cut.stats.rounds


def test_padding_stays_within_the_memory(loop):
    options, rows = SpeculationOptions(window=4, row_buckets=(40,)), network_tokens(7)
    token = 4 * loop.spec.scratch * SCHEDULE.num_steps * 2
    SpeculativeLoopHead(loop, options, memory=3 * token)(rows, SCHEDULE, Noise(2))
    # All calls have one shape, the largest that fits.
    assert loop.sizes == [3, 3, 3]


def test_with_one_bucket_a_token_does_not_depend_on_its_batch(loop):
    options = SpeculationOptions(window=6, row_buckets=(24,))
    head, rows = SpeculativeLoopHead(loop, options), network_tokens(11)
    together = head(rows, SCHEDULE, Noise(0))
    for index in (torch.tensor([3]), torch.tensor([9, 2]), torch.arange(10, -1, -1)):
        alone = head(part_of(rows, index), SCHEDULE, Noise(0))
        for name in RESULTS:
            assert torch.equal(getattr(alone, name), getattr(together, name)[index])
    assert set(loop.sizes) == {4}
