"""The PyTorch modules against the authors' vectors; padding and subsets change nothing."""

from dataclasses import replace

import pytest
import torch
from golden_backbone import golden_case, transparent_schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import TINY, relative_error, tiny_model, tiny_state, vectors

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.export.graphs.denoiser import DenoiserGraph
from cspd.export.graphs.denoiser_loop import DenoiserLoopGraph
from cspd.export.mar.assemble import assemble_mar

TOLERANCE = 1e-5
LABELS = torch.tensor([3, 417], dtype=torch.int32)
ALL = torch.arange(16, dtype=torch.int32).expand(2, -1)
MODEL = tiny_model()
VECTORS = vectors()


def run(tokens, visible, visible_len, labels=LABELS, positions=ALL):
    visible_len = torch.as_tensor(visible_len, dtype=torch.int32)
    return MODEL(tokens, visible, visible_len.expand(len(tokens)), labels, positions)


@pytest.mark.parametrize("count", [0, 5, 15])
def test_backbone_golden(count):
    tokens, visible, z = golden_case(count)
    assert visible.shape == (2, count)
    assert relative_error(run(tokens, visible, count), z) < TOLERANCE


@pytest.mark.parametrize("count", [0, 5, 15])
def test_backbone_golden_with_padding(count):
    tokens, visible, z = golden_case(count)
    padding = torch.randint(16, (2, 16 - count), generator=torch.Generator().manual_seed(0)).int()
    padded = torch.cat([visible, padding], dim=1)
    assert relative_error(run(tokens, padded, count), z) < TOLERANCE


def test_backbone_golden_with_ragged_lengths():
    few, many = golden_case(5), golden_case(15)
    tokens = torch.stack([few[0][0], many[0][1]])
    visible = torch.zeros(2, 15, dtype=torch.int32)
    visible[0, :5], visible[1] = few[1][0], many[1][1]
    z = run(tokens, visible, [5, 15])
    assert relative_error(z[0], few[2][0]) < TOLERANCE
    assert relative_error(z[1], many[2][1]) < TOLERANCE


@settings(deadline=None, max_examples=20)
@given(count=st.integers(0, 15), seed=st.integers(0, 2**31))
def test_padding_and_masked_tokens_have_no_influence(count, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 16, 16, generator=generator)
    visible = torch.rand(2, 16, generator=generator).argsort(1).int()
    expected = run(tokens, visible, count)
    # Other padding, and other numbers in the tokens that are not visible.
    changed = visible.clone()
    changed[:, count:] = torch.randint(16, (2, 16 - count), generator=generator).int()
    masked = torch.ones(2, 16, dtype=torch.bool).scatter(1, visible[:, :count].long(), False)
    other = torch.where(
        masked[..., None], 1e3 * torch.randn(2, 16, 16, generator=generator), tokens
    )
    assert torch.equal(run(other, changed, count), expected)


def test_visible_tokens_do_have_influence():
    tokens, visible, z = golden_case(5)
    changed = tokens.clone()
    changed[0, visible[0, 4].long()] += 1
    got = run(changed, visible, 5)
    assert relative_error(got[0], z[0]) > 1e-3
    assert relative_error(got[1], z[1]) < TOLERANCE


def test_order_of_visible_tokens_has_no_influence():
    tokens, visible, z = golden_case(5)
    assert relative_error(run(tokens, visible.flip(1), 5), z) < TOLERANCE


@settings(deadline=None, max_examples=20)
@given(count=st.sampled_from([0, 5, 15]), positions=st.lists(st.integers(0, 15), min_size=1))
def test_positions_are_a_subset_of_all(count, positions):
    tokens, visible, z = golden_case(count)
    index = torch.tensor(positions, dtype=torch.int32)
    got = run(tokens, visible, count, positions=index.expand(2, -1))
    assert got.shape == (2, len(positions), 32)
    assert relative_error(got, z[:, index.long()]) < TOLERANCE


def test_null_class_is_the_fake_latent():
    tokens, visible, _ = golden_case(5)
    state = tiny_state()
    state["class_emb.weight"][7] = state["fake_latent"][0]
    model = assemble_mar(TINY, state, "fp32")
    null, seven = (torch.full((2,), label, dtype=torch.int32) for label in (1000, 7))
    length = torch.full((2,), 5, dtype=torch.int32)
    assert torch.equal(
        model(tokens, visible, length, null, ALL), model(tokens, visible, length, seven, ALL)
    )
    assert relative_error(run(tokens, visible, 5, labels=null), golden_case(5)[2]) > 1e-3


def test_denoiser_golden():
    noise, variance = MODEL.diffloss.net(
        VECTORS["denoiser.x"], VECTORS["denoiser.t"], VECTORS["denoiser.z"]
    )
    got = torch.cat([noise, variance], dim=1)
    assert relative_error(got, VECTORS["denoiser.out"]) < TOLERANCE


def test_guided_denoiser_golden(golden_settings):
    # The authors run conditional rows, then unconditional ones, and use the variance of the former.
    out = VECTORS["denoiser_cfg.out"]
    index = torch.arange(5, dtype=torch.int32)
    mean, log_std, x0, fraction = DenoiserGraph(MODEL.diffloss)(
        VECTORS["denoiser.x"], index, index, VECTORS["denoiser_cfg.z"].reshape(2, 5, 32),
        torch.full((5,), golden_settings["denoiser_cfg_scale"]),
        transparent_schedule(VECTORS["denoiser.t"]),
    )  # fmt: skip
    assert relative_error(mean, out[:5, :16]) < TOLERANCE
    assert torch.equal(mean, x0)
    assert relative_error(2 * fraction - 1, out[:5, 16:]) < TOLERANCE
    assert relative_error(2 * log_std - 1, out[:5, 16:]) < TOLERANCE


def run_trajectory(name: str, scale: float):
    z = VECTORS[f"{name}.z"].reshape(-1, 5, 32)
    schedule = make_schedule(ScheduleSpec(), 25)
    return DenoiserLoopGraph(MODEL.diffloss)(
        VECTORS["trajectory.noise0"], VECTORS["trajectory.noise"], z,
        torch.full((5,), scale), torch.ones(5), schedule.table,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["trajectory", "trajectory_cfg"])
def test_trajectory_golden(name, golden_settings):
    scale = golden_settings["denoiser_cfg_scale"] if name.endswith("cfg") else 1.0
    sample, mean, log_std, sum_log_std = run_trajectory(name, scale)
    assert relative_error(sample, VECTORS[f"{name}.sample"]) < TOLERANCE
    assert relative_error(mean, VECTORS[f"{name}.mean"]) < TOLERANCE
    assert relative_error(log_std.exp(), VECTORS[f"{name}.std"]) < TOLERANCE
    assert relative_error(sum_log_std, VECTORS[f"{name}.sum_log_std"]) < TOLERANCE
    # The last step adds no noise.
    assert torch.equal(sample, mean)


def test_without_unconditional_branch_guidance_has_no_effect():
    one, four = run_trajectory("trajectory", 1.0), run_trajectory("trajectory", 4.0)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


def test_low_precision_stays_near_and_returns_float32():
    """Products in bfloat16 round at 2^-9 = 0.2 %; eight layers stay within a few percent."""
    tokens, visible, z = golden_case(5)
    model = assemble_mar(TINY, tiny_state(), "bf16")
    length = torch.full((2,), 5, dtype=torch.int32)
    got = model(tokens, visible, length, LABELS, ALL)
    assert got.dtype == torch.float32
    assert 1e-4 < relative_error(got, z) < 0.05


def test_weights_of_another_geometry_are_refused():
    with pytest.raises(RuntimeError, match=r"encoder_blocks\.2"):
        assemble_mar(replace(TINY, encoder_depth=3), tiny_state(), "fp32")
