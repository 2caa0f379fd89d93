"""Speculative rounds and transformers that are recorded: the images and counts of those that run.

Graphs are the stand-in of fake_gpu, networks PyTorch modules: what a GPU runs without any engine.
"""

import pytest
import torch
from fake_gpu import FakeGraphs

from cspd.engines.bundle import open_bundle
from cspd.engines.schedule import make_schedule
from cspd.runtime.commands.cli import shipped_bundle
from cspd.runtime.config import make_config
from cspd.runtime.heads.base import Rows
from cspd.runtime.heads.captured_rounds import CapturedRounds
from cspd.runtime.heads.plain import LoopHead
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.heads.speculative_loop import SpeculativeLoopHead
from cspd.runtime.noise import Noise, Purpose, RowNoise
from cspd.runtime.noise_table import TabledNoise
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions

METHODS = {
    "target": {"method": "target"},
    "lossless": {"method": "lossless", "window": 6},
    "cspd": {"method": "cspd", "gamma": 4},
    "prefix": {"method": "cspd", "gamma": 4, "verify": "prefix"},
    "lossless cspd": {"method": "cspd", "gamma": 4, "head": "lossless", "window": 6},
}


@pytest.fixture(scope="module")
def shipped():
    return open_bundle(shipped_bundle())


def made(bundle, graphs, device="cpu", **options):
    """Pixels, statistics and pipeline of three images, in batches of two."""
    values = {
        **bundle.manifest.defaults, "num_iter": 6, "head_steps": 12, "batch_size": 2,
        "num_images": 3, "labels": tuple(range(bundle.manifest.geometry.num_classes)),
        "backend": "torch", **options,
    }  # fmt: skip
    record = None if device == "cuda" else graphs is not None
    pipeline = Pipeline(Sessions(bundle, "torch", device, threads=1), graphs, record)
    batches = list(pipeline.generate(make_config(**values)))
    images = [torch.from_numpy(i.pixels).int() for batch, _ in batches for i in batch]
    return torch.stack(images), [statistics for _, statistics in batches], pipeline


@pytest.mark.parametrize("name", METHODS)
def test_the_same_images_and_counts(shipped, name):
    expected, counts, _ = made(shipped, None, **METHODS[name])
    graphs = FakeGraphs()
    found, statistics, pipeline = made(shipped, graphs, **METHODS[name])
    assert (found - expected).abs().max() <= 1
    assert [s.target_calls for s in statistics] == [s.target_calls for s in counts]
    assert pipeline.sessions.notes == []
    assert all(s.captured for s in pipeline.heads.captures.values() if s.eager)
    assert sum(stats.replayed for stats in pipeline.heads.captures.values()) > 0


def test_models_in_half_precision_take_the_first_step_by_their_head_in_float32(hoisted_bundle):
    pixels, _, pipeline = made(
        hoisted_bundle, FakeGraphs(), method="lossless", window=4, cfg=2.0, head_steps=12
    )
    assert pixels.float().std() > 1
    assert pipeline.sessions.notes == []
    assert pipeline.sessions.calls["target/denoiser_first"].calls > 0


def rows_of(count: int, dim: int) -> Rows:
    generator = torch.Generator().manual_seed(1)
    conditions = torch.randn(2, count, dim, generator=generator)
    one = torch.ones(count)
    return Rows(conditions, 2 * one, one, torch.arange(count), torch.arange(count))


@pytest.fixture(scope="module")
def heads(shipped):
    """Rounds one by one, and recorded ones, of the shipped target."""
    sessions = Sessions(shipped, "torch", threads=1)
    session, options = sessions("target/speculative_round"), SpeculationOptions(6)
    notes: list[str] = []
    captured = CapturedRounds(session, None, on_fallback=notes.append, graphs=FakeGraphs())
    plain = SpeculativeHead(session, options, shipped.manifest.geometry.token_dim)
    schedule = make_schedule(shipped.manifest.schedule, 30)
    return plain, SpeculativeLoopHead(captured, options), schedule


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_the_samples_and_statistics_of_the_rounds(heads, tokens):
    plain, recorded, schedule = heads
    rows = rows_of(tokens, 192)
    for seed in range(3):  # the second and third replay
        expected = plain(rows, schedule, Noise(seed))
        found = recorded(rows, schedule, Noise(seed))
        for name in ("sample", "mean", "log_std", "sum_log_std"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-3
            )
        assert (found.stats.tested == expected.stats.tested).all()
        assert (found.stats.accepted == expected.stats.accepted).all()
        assert found.stats.draws == expected.stats.draws


def test_a_first_step_of_its_own_goes_before_the_rounds(shipped):
    """With a window of one row, rounds are plain steps: the chain of the loop, with any first."""
    sessions = Sessions(shipped, "torch", threads=1)
    captured = CapturedRounds(
        sessions("target/speculative_round"), None, on_fallback=[].append, graphs=FakeGraphs()
    )
    head = SpeculativeLoopHead(captured, SpeculationOptions(1), first=sessions("target/denoiser"))
    plain = LoopHead(sessions("target/denoiser_loop"))
    schedule, rows = make_schedule(shipped.manifest.schedule, 20), rows_of(3, 192)
    for seed in range(2):
        found = head(rows, schedule, Noise(seed))
        expected = plain(rows, schedule, Noise(seed), Purpose.DENOISE)
        for name in ("sample", "mean", "log_std", "sum_log_std"):
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-3
            )
        assert found.stats.calls == 20


def test_candidates_that_run_out_are_drawn_again(heads, monkeypatch):
    plain, recorded, schedule = heads
    monkeypatch.setattr("cspd.runtime.heads.speculative_loop.POOL", 9)
    rows = rows_of(4, 192)
    for seed in range(2):
        expected, found = plain(rows, schedule, Noise(seed)), recorded(rows, schedule, Noise(seed))
        torch.testing.assert_close(found.sample, expected.sample, rtol=1e-3, atol=1e-3)
        assert found.stats.draws == expected.stats.draws


def test_a_graph_that_computes_something_else_is_given_up(shipped):
    class Wrong(FakeGraphs):
        def capture(self, work):
            replay = super().capture(work)
            return replay if self.captures == 1 else (lambda: None)

    sessions, notes = Sessions(shipped, "torch", threads=1), []
    captured = CapturedRounds(
        sessions("target/speculative_round"), None, on_fallback=notes.append, graphs=Wrong()
    )
    options = SpeculationOptions(6)
    head = SpeculativeLoopHead(captured, options)
    plain = SpeculativeHead(sessions("target/speculative_round"), options, 16)
    schedule, rows = make_schedule(shipped.manifest.schedule, 20), rows_of(2, 192)
    for seed in range(2):
        found, expected = head(rows, schedule, Noise(seed)), plain(rows, schedule, Noise(seed))
        torch.testing.assert_close(found.sample, expected.sample, rtol=1e-3, atol=1e-3)
    assert len(notes) == 1 and "differs from the eager run" in notes[0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_makes_the_images_of_the_cpu(shipped, name):
    expected, counts, _ = made(shipped, None, **METHODS[name])
    found, statistics, pipeline = made(shipped, None, device="cuda", **METHODS[name])
    assert ((found - expected).abs() > 2).float().mean() < 0.02
    assert [s.target_calls for s in statistics] == [s.target_calls for s in counts]
    assert pipeline.sessions.notes == []


@pytest.mark.parametrize("noise", [Noise(5), RowNoise([5, 2**40, 7], [0, 9, 4])])
def test_tabled_numbers_are_the_same(noise):
    images = torch.tensor([0, 1, 2, 0])
    table = TabledNoise(noise, images, 6)
    rows, positions = torch.tensor([2, 0, 1, 1]), torch.tensor([5, 0, 3, 4])
    for steps in (3, 8, 5):
        for found, expected in zip(
            table.chain(Purpose.DENOISE, rows, positions, steps, 7),
            noise.chain(Purpose.DENOISE, rows, positions, steps, 7),
            strict=True,
        ):
            assert torch.equal(found, expected)
        found = table.tests(Purpose.SPECULATE_TEST, rows, positions, steps)
        assert torch.equal(found, noise.tests(Purpose.SPECULATE_TEST, rows, positions, steps))
    for first in (0, torch.tensor([1, 0, 8, 3])):
        pair = (table, noise)
        found, expected = (
            n.candidates(Purpose.SPECULATE, rows, positions, first, 4, 7) for n in pair
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(table.orders(rows, 6), noise.orders(rows, 6))
