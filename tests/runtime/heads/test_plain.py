"""Heads of one member: calls that are cut to a memory budget."""

import torch

from cspd.engines.backends import open_session
from cspd.engines.schedule import make_schedule
from cspd.engines.sessions.session import TimedSession
from cspd.runtime.heads.base import Rows
from cspd.runtime.heads.plain import LoopHead
from cspd.runtime.noise import Noise, Purpose


def test_loop_is_cut_to_its_memory(tiny_bundle):
    """As many calls as the budget asks for, the same tokens; a budget below one token is one."""
    session = TimedSession(open_session(tiny_bundle, "target/denoiser_loop", "onnxruntime"))
    schedule = make_schedule(tiny_bundle.manifest.schedule, 10)
    generator = torch.Generator().manual_seed(0)
    width = session.spec.inputs[2].shape[-1]
    rows = Rows(
        conditions=torch.randn(2, 7, width, generator=generator),
        guidance=torch.full((7,), 3.0),
        temperature=torch.ones(7),
        images=torch.arange(7),
        positions=torch.arange(7),
    )
    token = 4 * session.spec.scratch * schedule.num_steps * len(rows.conditions)
    samples = {}
    for memory, calls in ((7 * token, 1), (7 * token - 1, 2), (3 * token, 3), (1, 7)):
        before = session.stats.calls
        sampled = LoopHead(session, memory)(rows, schedule, Noise(3), Purpose.DENOISE)
        assert session.stats.calls - before == calls
        samples[memory] = sampled.sample
    for sample in samples.values():
        torch.testing.assert_close(sample, samples[7 * token], rtol=1e-4, atol=1e-5)
