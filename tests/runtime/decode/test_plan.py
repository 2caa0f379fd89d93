"""Mask schedule and guidance against the authors' loop, for any number of tokens and steps."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import vectors

from cspd.engines.errors import CspdError
from cspd.runtime.decode.plan import MaskPlan, WindowPlan


def authors_loop(length: int, num_iter: int, cfg: float) -> list[tuple[int, float]]:
    """Masked tokens after, and linear guidance in, every step of MAR's sample_tokens."""
    masked, steps = length, []
    for step in range(num_iter):
        mask_len = math.floor(length * math.cos(math.pi / 2 * (step + 1) / num_iter))
        mask_len = max(1, min(masked - 1, mask_len))
        scale = 1 + (cfg - 1) * (length - mask_len) / length
        masked = 0 if step == num_iter - 1 else mask_len
        steps.append((masked, scale))
    return steps


@st.composite
def plans(draw):
    length = draw(st.integers(1, 300))
    num_iter = draw(st.integers(1, length))
    return MaskPlan(length, num_iter, draw(st.floats(0, 10)), "linear")


def test_golden_mask_lengths():
    # The authors' variable stays at 1 in the last step, where they predict every token.
    *masked, last = vectors()["image.mask_len"].tolist()
    assert last == 1
    assert [16 - known for known in MaskPlan(16, 6).boundaries] == [*masked, 0]


@given(plans())
def test_boundaries_rise_to_the_last_token_in_num_iter_steps(plan):
    boundaries = plan.boundaries
    assert len(boundaries) == plan.num_iter
    assert boundaries[0] >= 1 and boundaries[-1] == plan.num_tokens
    assert all(a < b for a, b in itertools.pairwise(boundaries))


@given(plans())
def test_every_step_is_the_authors(plan):
    known = 0
    for masked, scale in authors_loop(plan.num_tokens, plan.num_iter, plan.cfg):
        assert plan.guidance(known) == pytest.approx(scale, rel=1e-12)
        known = plan.stop(known)
        assert known == plan.num_tokens - masked
    assert known == plan.num_tokens


@given(plans(), st.integers(0, 299))
def test_a_step_that_starts_between_boundaries_ends_at_the_next(plan, known):
    known %= plan.num_tokens
    above = [boundary for boundary in plan.boundaries if boundary > known]
    assert plan.stop(known) == min(above)


@given(plans())
def test_widest_step(plan):
    known, widths = 0, []
    while known < plan.num_tokens:
        widths.append(plan.stop(known) - known)
        known = plan.stop(known)
    assert plan.widest == max(widths) and sum(widths) == plan.num_tokens


def test_one_token_per_step_and_all_in_one_step():
    assert MaskPlan(49, 49).boundaries == tuple(range(1, 50))
    assert MaskPlan(49, 1).boundaries == (49,)


def test_constant_guidance():
    plan = MaskPlan(16, 6, 2.5, "constant")
    assert {plan.guidance(known) for known in range(16)} == {2.5}


@pytest.mark.parametrize("num_iter", [-1, 0, 17])
def test_wrong_number_of_steps(num_iter):
    with pytest.raises(CspdError, match=rf"--num-iter is {num_iter}, expected 1\.\.16"):
        MaskPlan(16, num_iter)


@pytest.mark.parametrize(
    ("num_iter", "prefill", "gamma", "calls", "mean", "most"),
    [
        (256, 0.05, 4, 74, 4, 4),
        (256, 0.05, 32, 21, 30.4, 32),
        (64, 0.15, 8, 17, 35, 49),
        (64, 0.15, 32, 12, 123, 176),
    ],
)
def test_windows_in_steps_have_the_counts_of_the_released_runner(
    num_iter, prefill, gamma, calls, mean, most
):
    """Target calls and tokens per verification as counted from the released code (D6, D13)."""
    windows = WindowPlan(MaskPlan(256, num_iter), gamma, prefill, in_steps=True)
    assert windows.target_rounds == calls
    widths = windows.widths
    assert sum(widths) / len(widths) == pytest.approx(mean, abs=0.5)
    assert max(widths) == most


def test_a_share_of_steps_is_a_smaller_share_of_tokens():
    """15 % of 64 steps are 10 tokens of 256, 3.9 % (D13)."""
    assert WindowPlan(MaskPlan(256, 64), 8, 0.15, in_steps=True).first == 10


@given(plans(), st.integers(1, 300), st.floats(0, 1), st.booleans())
def test_windows_are_whole_steps_and_make_up_the_image(plan, gamma, prefill, in_steps):
    windows = WindowPlan(plan, gamma, prefill, in_steps)
    ends = (0, *plan.boundaries)
    known = windows.first
    assert known in ends
    if not in_steps:
        assert known >= math.floor(prefill * plan.num_tokens)
    for width in windows.widths:
        known += width
        assert known in ends and 0 < width <= windows.widest
        steps = ends.index(known) - ends.index(known - width)
        assert steps <= gamma if in_steps else width >= gamma or known == plan.num_tokens
    assert known == plan.num_tokens
    # From anywhere, as prefix verification starts: never beyond the width that shapes hold.
    for start in range(plan.num_tokens):
        assert start < windows.stop(start) <= start + windows.widest
