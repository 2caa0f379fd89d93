"""Mask schedule and guidance against the authors' loop, for any number of tokens and steps."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import vectors

from cspd.engines.errors import CspdError
from cspd.runtime.plan import MaskPlan


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
