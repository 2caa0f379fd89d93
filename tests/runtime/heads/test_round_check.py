"""Speculation over graphs that make no headway: refused after what a chain can need."""

import numpy as np
import pytest
import torch
from chains import CHANNELS, SCHEDULE, tokens

from cspd.engines.errors import BundleError
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.runtime.heads.round_check import (
    MOST_DRAWN,
    MOST_DRAWN_PER_STEP,
    Counts,
    check_progress,
)  # fmt: skip
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.heads.speculative_loop import POOL, SpeculativeLoopHead
from cspd.runtime.noise import Noise

ROWS = tokens(3)
STEPS = SCHEDULE.num_steps
LIMIT = MOST_DRAWN + MOST_DRAWN_PER_STEP * STEPS
SPEC = GraphSpec(
    name="speculative_loop", inputs=(TensorSpec(name="x", shape=("tokens", CHANNELS)),),
    outputs=(), axes={"tokens": Axis(min=1, opt=2, max=64)},
)  # fmt: skip
# By case, what becomes of tokens [N] at `step`: their next step, steps moved, candidates drawn.
STUCK = {
    "nothing happens": lambda step: (step, 0, 0),
    "only ever draws": lambda step: (step, 0, 1),
    "says that it moved": lambda step: (step, 1, 0),
    "moves without saying": lambda step: (step - 1, 0, 0),
    "moves back": lambda step: (step + 1, -1, 1),
    "beyond the end": lambda step: (step - 1000, 1000, 0),
    "draws more than there is": lambda step: (step, 0, 1_000_000),
    "draws less than nothing": lambda step: (step, 0, -1),
}


class Stuck:
    """A round, or a loop of one round, that advances its tokens as `rule` says."""

    spec, device = SPEC, torch.device("cpu")

    def __init__(self, rule, loop: bool) -> None:
        self.rule, self.loop, self.calls = rule, loop, 0

    def __call__(self, **t):
        self.calls += 1
        live = t["step"] >= 0
        after, moved, drawn = (
            torch.where(live, torch.as_tensor(value), rest).int()
            for value, rest in zip(self.rule(t["step"]), (-1, 0, 0), strict=True)
        )
        if self.loop:
            moved, drawn = (
                torch.nn.functional.pad(value[:, None], (0, POOL - 1)) for value in (moved, drawn)
            )
        zeros = dict.fromkeys(("mean", "log_std", "sum_log_std"), torch.zeros_like(t["x"]))
        state = {f"next_{name}": t[name] for name in ("x", "x0", "fraction")}
        return {**state, **zeros, "next_step": after, "moved": moved, "drawn": drawn}


def sample(rule, loop: bool):
    stuck, options = Stuck(rule, loop), SpeculationOptions(window=4)
    head = SpeculativeLoopHead if loop else SpeculativeHead
    run = head(stuck, options) if loop else head(stuck, options, CHANNELS)
    return stuck, lambda: run(ROWS, SCHEDULE, Noise(0))


@pytest.mark.parametrize("loop", [False, True], ids=["rounds", "loop"])
@pytest.mark.parametrize("case", STUCK)
def test_a_graph_that_never_ends_is_refused(case, loop):
    stuck, run = sample(STUCK[case], loop)
    with pytest.raises(BundleError, match=r"never comes to an end; rebuild the bundle"):
        run()
    # A call that only draws is legitimate, so that this case alone takes as many as are allowed.
    assert stuck.calls == (LIMIT + 1 if case == "only ever draws" else 1)


@pytest.mark.parametrize("loop", [False, True], ids=["rounds", "loop"])
def test_calls_that_only_draw_are_fine_on_the_way(loop):
    """Every second call of a step finds no candidate."""
    calls = []

    def rule(step):
        calls.append(None)
        return (step - 1, 1, 1) if len(calls) % 2 == 0 else (step, 0, 8)

    stuck, run = sample(rule, loop)
    stats = run().stats
    assert stuck.calls == 2 * STEPS and stats.draws == 3 * STEPS * 9


def counts(**changes) -> Counts:
    """Two tokens, the second finished; the first moves from step 5 to 3."""
    right = {"step": [5, -1], "after": [3, -1], "moved": [2, 0], "drawn": [0, 0], "used": [9, 0]}
    return Counts(**{name: np.array(value) for name, value in {**right, **changes}.items()})


def test_what_is_right_passes():
    check_progress(counts(), 8, STEPS)
    check_progress(counts(used=[LIMIT, 0]), 8, STEPS)
    check_progress(counts(moved=[[1, 1], [0, 0]], drawn=[[0, 8], [0, 0]]), 8, STEPS)


WRONG = {
    "a finished token comes back": {"after": [3, 0]},
    "a finished token draws": {"drawn": [0, 1]},
    "more than a chain can need": {"used": [LIMIT + 1, 0]},
    "rounds that cancel out": {"moved": [[3, -1], [0, 0]], "drawn": [[0, 0], [0, 0]]},
    "more candidates than the call had": {"drawn": [9, 0]},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(case):
    with pytest.raises(BundleError, match="never comes to an end"):
        check_progress(counts(**WRONG[case]), 8, STEPS)
