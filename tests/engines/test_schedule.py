"""The schedule table against the authors' coefficients and against closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from recorded import vectors
from safetensors.torch import load_file

from cspd.engines.errors import CspdError
from cspd.engines.schedule import COLUMNS, MAX_BETA, FlowSpec, ScheduleSpec, make_schedule

TESTS = Path(__file__).parents[1]
GOLDEN = {name.partition(".")[2]: v for name, v in vectors().items() if name.startswith("schedule")}


def column(schedule, name: str) -> np.ndarray:
    return schedule.table[:, COLUMNS.index(name)].double().numpy()


def test_golden_respacing():
    schedule = make_schedule(ScheduleSpec(), 25)
    assert schedule.timesteps.tolist() == GOLDEN["timesteps"].tolist()
    for name in ("alphas_cumprod", "betas"):
        np.testing.assert_allclose(getattr(schedule, name), GOLDEN[name].numpy(), rtol=1e-10)


def test_golden_coefficients():
    schedule = make_schedule(ScheduleSpec(), 25)
    ab = GOLDEN["alphas_cumprod"].numpy()
    expected = {
        "timestep": GOLDEN["timesteps"].numpy(),
        "x0_from_x": 1 / np.sqrt(ab),
        "x0_from_noise": np.sqrt(1 / ab - 1),
        "mean_x0": GOLDEN["posterior_mean_coef1"].numpy(),
        "mean_x": GOLDEN["posterior_mean_coef2"].numpy(),
        "log_std_min": 0.5 * GOLDEN["posterior_log_variance_clipped"].numpy(),
        "log_std_max": 0.5 * np.log(GOLDEN["betas"].numpy()),
    }
    assert set(expected) == set(COLUMNS)
    for name, values in expected.items():
        # float32 storage: half a unit in the last place is 6e-8.
        np.testing.assert_allclose(column(schedule, name), values, rtol=7e-8, err_msg=name)


def test_full_grid_is_the_cosine_schedule():
    schedule = make_schedule(ScheduleSpec(), 1000)
    assert schedule.timesteps.tolist() == list(range(1000))

    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    # Products of ratios telescope: alpha_bar(t) = signal((t + 1) / 1000) / signal(0), except for
    # the last time, where beta is cut at 0.999.
    closed = [signal((t + 1) / 1000) / signal(0) for t in range(999)]
    np.testing.assert_allclose(schedule.alphas_cumprod[:999], closed, rtol=1e-9)
    last = schedule.alphas_cumprod[998] * (1 - MAX_BETA)
    assert schedule.alphas_cumprod[999] == pytest.approx(last, rel=1e-9)


@pytest.mark.parametrize("steps", [2, 25, 100])
@pytest.mark.parametrize("clip", [None, 950])
def test_kernel_is_the_posterior_of_gaussians(steps, clip):
    schedule = make_schedule(ScheduleSpec(clip_timesteps=clip), steps)
    beta = schedule.betas[1:]
    ab_prev = schedule.alphas_cumprod[:-1]
    # x' ~ N(sqrt(ab_prev) x0, 1 - ab_prev), then x ~ N(sqrt(1 - beta) x', beta): Bayes' rule.
    precision = 1 / (1 - ab_prev) + (1 - beta) / beta
    np.testing.assert_allclose(
        column(schedule, "mean_x0")[1:], np.sqrt(ab_prev) / (1 - ab_prev) / precision, rtol=1e-6
    )
    np.testing.assert_allclose(
        column(schedule, "mean_x")[1:], np.sqrt(1 - beta) / beta / precision, rtol=1e-6
    )
    np.testing.assert_allclose(
        np.exp(-2 * column(schedule, "log_std_min")[1:]), precision, rtol=1e-5
    )
    # The last step returns its prediction of x0; its variance is borrowed from its neighbour.
    assert column(schedule, "mean_x0")[0] == pytest.approx(1, rel=1e-7)
    assert column(schedule, "mean_x")[0] == 0
    assert column(schedule, "log_std_min")[0] == column(schedule, "log_std_min")[1]


@given(x0=st.floats(-5, 5), eps=st.floats(-5, 5), step=st.integers(0, 99))
def test_noise_and_signal_are_inverse(x0, eps, step):
    schedule = make_schedule(ScheduleSpec(clip_timesteps=950), 100)
    ab = schedule.alphas_cumprod[step]
    x = math.sqrt(ab) * x0 + math.sqrt(1 - ab) * eps
    found = column(schedule, "x0_from_x")[step] * x - column(schedule, "x0_from_noise")[step] * eps
    # Float32 coefficients of size 1 / sqrt(ab), at most 13 here.
    assert found == pytest.approx(x0, abs=1e-4)


def test_first_step_is_ill_conditioned_unless_clipped():
    """Shift of the mean per error of the predicted noise, d mean / d eps of the first step."""

    def gain(clip):
        schedule = make_schedule(ScheduleSpec(clip_timesteps=clip), 100)
        return (column(schedule, "mean_x0") * column(schedule, "x0_from_noise"))[-1]

    # beta sqrt(ab_prev / ab) with beta = MAX_BETA: 1 / sqrt(1e-3) times 10, the ratio of signals.
    assert gain(None) == pytest.approx(316, rel=0.01)
    for clip in (980, 950):
        # Near the end ab falls as the square of the distance to it: with the ratio r of the two
        # distances, beta = 1 - 1 / r^2 and the gain is r - 1 / r.
        distance, step = 999 - clip, clip / 99
        ratio = (distance + step) / distance
        assert gain(clip) == pytest.approx(ratio - 1 / ratio, rel=0.05)


@given(
    train=st.integers(2, 3000), clip=st.none() | st.integers(1, 4000), share=st.floats(0, 1)
)  # fmt: skip
def test_any_length_of_chain(train, clip, share):
    spec = ScheduleSpec(train_steps=train, clip_timesteps=clip)
    last = train - 1 if clip is None else min(train - 1, clip)
    steps = 2 + round(share * (last - 1))
    schedule = make_schedule(spec, steps)
    assert schedule.num_steps == steps and spec.last_timestep == last
    assert schedule.timesteps[0] == 0 and schedule.timesteps[-1] == last
    assert (np.diff(schedule.timesteps) > 0).all()
    assert schedule.table.dtype == torch.float32 and schedule.table.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "steps", "expected"),
    [
        (ScheduleSpec(), 1, r"got 1, expected 2\.\.1000"),
        (ScheduleSpec(), 1001, r"got 1001, expected 2\.\.1000"),
        (ScheduleSpec(clip_timesteps=950), 952, r"got 952, expected 2\.\.951"),
    ],
)
def test_wrong_number_of_steps(spec, steps, expected):
    with pytest.raises(CspdError, match=expected):
        make_schedule(spec, steps)


@pytest.mark.parametrize(
    "values",
    [{"kind": "linear"}, {"train_steps": 1}, {"clip_timesteps": 0}, {"clip": 950}],
    ids=str,
)
def test_schedule_in_a_manifest_is_validated(values):
    with pytest.raises(ValidationError):
        ScheduleSpec(**values)


FLOWS = {
    "nextstep.shift1": {"embeds": "1 - s"},
    "nextstep.shift3.2": {"embeds": "1 - s", "shift": 3.2},
    "spherear.steps100": {"embeds": "1000 (1 - s)"},
}


@pytest.mark.parametrize("run", FLOWS)
def test_flow_tables_of_the_authors(run):
    """The coefficients that their samplers use; see tests/golden/flow_head_tiny.json."""
    golden = load_file(TESTS / "golden" / "flow_head_tiny.vectors.safetensors")[f"{run}.table"]
    spec = FlowSpec(out="data - noise", euler_at_last=True, **FLOWS[run])
    torch.testing.assert_close(
        make_schedule(spec, len(golden)).table, golden.float(), rtol=1e-5, atol=1e-6
    )


def test_a_flow_whose_last_step_is_the_mean_of_the_others():
    """As xAR samples: the last step is 1.96 x0 - x; the time is truncated in float32."""
    spec = FlowSpec(out="noise - data", embeds="int(1000 s)", euler_at_last=False)
    schedule = make_schedule(spec, 9)
    last = {name: column(schedule, name)[0] for name in COLUMNS}
    assert last["mean_x0"] == pytest.approx(1.96) and last["mean_x"] == pytest.approx(-1)
    assert last["x0_from_noise"] == pytest.approx(0.04)
    level = np.linspace(0.04, 1, 9).astype(np.float32)
    assert column(schedule, "timestep").tolist() == np.floor(1000 * level).tolist()
    assert column(schedule, "timestep")[-1] == 1000


@given(steps=st.integers(2, 40), shift=st.floats(0.2, 5))
def test_a_flow_s_last_step_from_the_truth_ends_at_the_truth(steps, shift):
    """From x = (1 - s) x0 + s noise every mean lies nearer to x0; with Euler the last one is it."""
    spec = FlowSpec(out="noise - data", embeds="1 - s", euler_at_last=True, shift=shift)
    schedule = make_schedule(spec, steps)
    level = column(schedule, "x0_from_noise")
    assert (np.diff(level) > 0).all() and level[-1] == pytest.approx(1)
    mean_x0, mean_x = column(schedule, "mean_x0"), column(schedule, "mean_x")
    # A step of the data alone (noise = 0) scales it from 1 - s to 1 - s'.
    ends = mean_x0 + mean_x * (1 - level)
    np.testing.assert_allclose(ends[1:], 1 - level[:-1], atol=1e-6)
    assert ends[0] == pytest.approx(1 - level[0] + 0.04, abs=1e-6)


def test_a_wrong_flow_is_refused():
    for wrong in ({"last": 0.0}, {"last": 1.0}, {"shift": 0.0}, {"out": "velocity"}):
        with pytest.raises(ValidationError):
            FlowSpec(**{"out": "data - noise", "embeds": "1 - s", "euler_at_last": True, **wrong})
    with pytest.raises(CspdError, match=r"got 1, expected 2\.\.1000"):
        make_schedule(FlowSpec(out="data - noise", embeds="1 - s", euler_at_last=True), 1)
