"""Hoisting changes neither stepping nor speculation; the memory decides whether it is done."""

import pytest
import torch

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.engines.sessions.session import TimedSession, TorchSession
from cspd.export.graphs.denoiser import DenoiserGraph, denoiser_spec
from cspd.export.graphs.hoisted_round import HoistedRoundGraph, hoisted_round_spec
from cspd.export.graphs.modulation import (
    TABLE_STEPS,
    HeadModulationGraph,
    HoistedDenoiserGraph,
    hoisted_spec,
    modulation_bytes,
    modulation_spec,
)
from cspd.export.graphs.speculative_round import SpeculativeRoundGraph, round_spec
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import MarConfig
from cspd.runtime.heads.base import Rows
from cspd.runtime.heads.captured import bucket
from cspd.runtime.heads.plain import StepHead
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.heads.switch import Room, Switch
from cspd.runtime.noise import Noise, Purpose

CONFIG = MarConfig(4, 24, 1, 1, 2, head_width=40, head_depth=2)
SCHEDULE = make_schedule(ScheduleSpec(clip_timesteps=950), 12)
GRAPHS = {
    "denoiser": (DenoiserGraph, denoiser_spec),
    "speculative_round": (SpeculativeRoundGraph, round_spec),
    "head_modulation": (HeadModulationGraph, modulation_spec),
    "denoiser_hoisted": (HoistedDenoiserGraph, hoisted_spec),
    "speculative_round_hoisted": (HoistedRoundGraph, hoisted_round_spec),
}
RESULTS = ("sample", "mean", "log_std", "sum_log_std")
MAX_ROWS = 64
TOKEN = modulation_bytes(CONFIG, SCHEDULE.num_steps, branches=2)


@pytest.fixture
def sessions():
    """Counting sessions of one head in PyTorch, by name."""
    torch.manual_seed(1)
    head = DiffusionLoss(CONFIG)
    with torch.no_grad():
        head.net.final_layer.linear.weight.mul_(0.3)
    return {
        name: TimedSession(TorchSession(spec(CONFIG, MAX_ROWS), graph(head), torch.device("cpu")))
        for name, (graph, spec) in GRAPHS.items()
    }


def rows_of(count: int) -> Rows:
    conditions = torch.randn(2, count, 24, generator=torch.Generator().manual_seed(2))
    guidance, number = torch.linspace(1, 2, count), torch.arange(count)
    return Rows(conditions, guidance, torch.ones(count), number, number)


def stepping(sessions, memory: int, first=None) -> Switch:
    modulate = sessions["head_modulation"]
    return Switch(
        Room(modulate, memory, lambda tokens: bucket(tokens, MAX_ROWS)).holds,
        StepHead(sessions["denoiser_hoisted"], first, modulate=modulate),
        StepHead(sessions["denoiser"], first),
    )


def speculating(sessions, memory: int, **options) -> Switch:
    options, modulate = SpeculationOptions(5, **options), sessions["head_modulation"]
    hoisted, channels = sessions["speculative_round_hoisted"], CONFIG.token_dim
    return Switch(
        Room(modulate, memory, options.call_tokens).holds,
        SpeculativeHead(hoisted, options, channels, modulate=modulate),
        SpeculativeHead(sessions["speculative_round"], options, channels),
    )


def calls(sessions) -> dict[str, int]:
    return {name: session.stats.calls for name, session in sessions.items() if session.stats.calls}


def check_equal(got, expected) -> None:
    for name in RESULTS:
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(("tokens", "fits"), [(8, True), (7, False), (0, False)])
def test_stepping(sessions, tokens, fits):
    """Seven tokens are padded to a call of eight."""
    rows, steps = rows_of(7), SCHEDULE.num_steps
    got = stepping(sessions, tokens * TOKEN)(rows, SCHEDULE, Noise(4), Purpose.DENOISE)
    hoisted = {"head_modulation": 1, "denoiser_hoisted": steps}
    assert calls(sessions) == (hoisted if fits else {"denoiser": steps})
    expected = StepHead(sessions["denoiser"])(rows, SCHEDULE, Noise(4), Purpose.DENOISE)
    check_equal(got, expected)


def test_first_step_with_conditions_of_its_own(sessions):
    head = stepping(sessions, 8 * TOKEN, first=sessions["denoiser"])
    got = head(rows_of(5), SCHEDULE, Noise(4), Purpose.DENOISE)
    steps = SCHEDULE.num_steps
    counts = {"denoiser": 1, "head_modulation": 1, "denoiser_hoisted": steps - 1}
    assert calls(sessions) == counts
    expected = StepHead(sessions["denoiser"])(rows_of(5), SCHEDULE, Noise(4), Purpose.DENOISE)
    check_equal(got, expected)


@pytest.mark.parametrize(("tokens", "fits"), [(7, True), (6, False), (0, False)])
def test_speculation(sessions, tokens, fits):
    rows = rows_of(7)
    got = speculating(sessions, tokens * TOKEN)(rows, SCHEDULE, Noise(4), Purpose.DENOISE)
    name = "speculative_round_hoisted" if fits else "speculative_round"
    assert calls(sessions) == {name: got.stats.calls} | ({"head_modulation": 1} if fits else {})
    options = SpeculationOptions(5)
    whole = SpeculativeHead(sessions["speculative_round"], options, CONFIG.token_dim)
    expected = whole(rows, SCHEDULE, Noise(4), Purpose.DENOISE)
    check_equal(got, expected)
    # Tokens finish in different rounds, so that the table and the tokens of a call part.
    assert got.stats.rounds == expected.stats.rounds and got.stats.rows == expected.stats.rows
    assert 0 < got.stats.accepted.sum() < got.stats.tested.sum()


def test_every_chunk_of_a_speculation_has_a_table_of_its_own(sessions):
    head = speculating(sessions, 3 * TOKEN, row_buckets=(15,))
    got = head(rows_of(7), SCHEDULE, Noise(4), Purpose.DENOISE)
    assert calls(sessions).keys() == {"head_modulation", "speculative_round_hoisted"}
    assert sessions["head_modulation"].stats.calls == 3
    whole = speculating(sessions, 0, row_buckets=(15,))
    expected = whole(rows_of(7), SCHEDULE, Noise(4), Purpose.DENOISE)
    assert "speculative_round" in calls(sessions)
    check_equal(got, expected)


def test_with_one_bucket_a_token_does_not_depend_on_its_batch(sessions):
    head = speculating(sessions, 4 * TOKEN, row_buckets=(20,))
    rows = rows_of(7)
    together = head(rows, SCHEDULE, Noise(4), Purpose.DENOISE)
    alone = head(rows.take(torch.tensor([5])), SCHEDULE, Noise(4), Purpose.DENOISE)
    assert sessions["speculative_round"].stats.calls == 0
    for name in RESULTS:
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[5])


def test_what_the_graphs_do_not_take_is_not_hoisted(sessions):
    """However much memory there is: a longer schedule, and more tokens than one table holds."""
    plenty = 1 << 40
    long = make_schedule(ScheduleSpec(clip_timesteps=950), TABLE_STEPS + 1)
    stepping(sessions, plenty)(rows_of(1), long, Noise(4), Purpose.DENOISE)
    stepping(sessions, plenty)(rows_of(MAX_ROWS + 1), SCHEDULE, Noise(4), Purpose.DENOISE)
    speculating(sessions, plenty)(rows_of(1), long, Noise(4), Purpose.DENOISE)
    assert calls(sessions).keys() == {"denoiser", "speculative_round"}
