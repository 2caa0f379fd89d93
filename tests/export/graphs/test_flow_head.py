"""The flow head of other authors (NextStep-1) in the graphs of MAR's head: only data differ."""

from pathlib import Path

import pytest
import torch
from recorded import relative_error
from safetensors.torch import load_file
from toy_family import FlowHead, flow_head

from cspd.engines.schedule import FlowSpec, make_schedule
from cspd.engines.sessions.session import TorchSession
from cspd.export.graphs.denoiser import DenoiserGraph, denoiser_spec
from cspd.export.mar.presets import MarConfig
from cspd.runtime.heads.plain import step_loop

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIG = MarConfig(4, 96, 1, 1, 2, head_width=32, head_depth=2, token_dim=64)
CPU = torch.device("cpu")
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def vectors():
    return load_file(GOLDEN / "flow_head_tiny.vectors.safetensors")


@pytest.fixture(scope="module")
def head():
    weights = load_file(GOLDEN / "flow_head_tiny.weights.safetensors")
    prefix = "nextstep."
    loss = flow_head(CONFIG)
    named = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    loss.load_state_dict(named)
    return loss


def test_one_evaluation(head, vectors):
    assert isinstance(head.net, FlowHead)
    with torch.inference_mode():
        out, _ = head.net(*(vectors[f"nextstep.net.{name}"] for name in ("x", "t", "c")))
    assert relative_error(out, vectors["nextstep.net.out"]) < TOLERANCE


@pytest.mark.parametrize(("run", "shift", "cfg"), [("shift1", 1.0, 3.0), ("shift3.2", 3.2, 7.5)])
def test_whole_chains(head, vectors, run, shift, cfg):
    """The states after every step, and the sample, of the authors' sampler."""
    spec = FlowSpec(out="data - noise", embeds="1 - s", euler_at_last=True, shift=shift)
    noise, states = (vectors[f"nextstep.{run}.{name}"] for name in ("noise", "states"))
    schedule, count = make_schedule(spec, len(states)), states.shape[1]
    session = TorchSession(denoiser_spec(CONFIG, 64), DenoiserGraph(head), CPU)
    seen = {}

    def watched(**inputs):
        seen[int(inputs["step"][0])] = inputs["x"]
        return session(**inputs)

    watched.spec, watched.device = session.spec, CPU
    ones = torch.ones(count)
    out = step_loop(watched, None)(
        noise0=vectors[f"nextstep.{run}.noise0"], noise=noise,
        conditions=vectors[f"nextstep.{run}.c"].reshape(2, count, -1), guidance=cfg * ones,
        temperature=ones, schedule=schedule.table,
    )  # fmt: skip
    # What step s begins with is what the step before it, s + 1, returned.
    for step in range(schedule.num_steps - 1):
        assert relative_error(seen[step], states[step + 1]) < TOLERANCE, step
    assert relative_error(out["sample"], vectors[f"nextstep.{run}.sample"]) < TOLERANCE
