"""How much of an autoregressive step is launched one by one, beside what is recorded.

On a GPU a launch takes the host ten microseconds whatever its size: these are budgets, to be
lowered, never raised without a reason.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from fake_gpu import FakeGraphs
from torch.utils._python_dispatch import TorchDispatchMode

from cspd.engines.bundle import open_bundle
from cspd.runtime.commands.cli import shipped_bundle
from cspd.runtime.config import make_config
from cspd.runtime.noise_table import TabledNoise
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions

VIEWS = {
    "view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "permute", "alias",
    "detach", "split", "unbind", "as_strided", "squeeze", "narrow", "_unsafe_view", "lift_fresh",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operations that are not part of a replay."""

    def __init__(self, graphs: FakeGraphs) -> None:
        super().__init__()
        self.graphs, self.count = graphs, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.graphs.replaying and function.overloadpacket.__name__ not in VIEWS:
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("method", "budget"), [("target", 71), ("lossless", 108)])
def test_launches_of_a_step(method, budget):
    bundle, graphs, seen = open_bundle(shipped_bundle()), FakeGraphs(), []
    pipeline = Pipeline(Sessions(bundle, "torch", threads=1), graphs, record=True)

    def tabled(sampler, batch):  # as on a GPU
        return replace(sampler, noise=TabledNoise(sampler.noise, batch.images, 49))

    pipeline._tabled = tabled
    values = {
        **bundle.manifest.defaults, "num_iter": 7, "head_steps": 10, "num_images": 1,
        "batch_size": 1, "backend": "torch", "labels": (0,), "method": method, "window": 6,
    }  # fmt: skip
    if method == "target":
        del values["window"]
    config = make_config(**values)
    with torch.inference_mode():
        list(pipeline.generate(config))  # everything is recorded in the first image
        with Launches(graphs) as launches:
            list(pipeline.generate(config, on_step=lambda *_: seen.append(launches.count)))
    steps = [b - a for a, b in pairwise(seen)]
    assert max(steps) <= budget
