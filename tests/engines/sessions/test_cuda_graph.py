"""Captured loops: what is replayed, when, and what happens when it cannot be."""

from collections.abc import Callable

import pytest
import torch
from fake_gpu import FakeEngine, FakeGraphs, FakeStreams
from tiny_graphs import GetGraph
from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.engines.sessions.cuda_graph import CapturedLoop, TorchGraphs, relative_error
from cspd.engines.trt.load import LoadedEngine
from cspd.engines.trt.session import TrtSession

STEPS = 5
CPU = torch.device("cpu")


class Scaled:
    """A loop with persistent outputs, as an engine has; counts how often it is made and run."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.runs = 0
        self.buffer = torch.zeros(64, 4)

    def __call__(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        self.runs += 1
        out = self.buffer[: len(x)]
        out.copy_(x)
        for _ in range(STEPS):
            out.mul_(scale)
        return {"sample": out}


class Spoiled(Scaled):
    """A loop whose replays are off by `error`."""

    def __init__(self, graphs: FakeGraphs, error: float) -> None:
        super().__init__()
        self.graphs, self.error = graphs, error

    def __call__(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        result = super().__call__(x, scale)
        if self.graphs.replaying:
            result["sample"].add_(self.error)
        return result


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def fresh_count():
    Scaled.made = 0


def inputs(rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 4, generator=generator),
        "scale": torch.rand(1, generator=generator) + 0.5,
    }


def expected(values: dict[str, Tensor]) -> Tensor:
    return values["x"] * values["scale"] ** STEPS


def test_one_capture_per_shape_and_fresh_values_every_time(told):
    graphs = FakeGraphs()
    loop = CapturedLoop(Scaled, on_fallback=told.append, graphs=graphs)
    for seed, rows in enumerate([8, 8, 16, 8, 16, 8]):
        values = inputs(rows, seed)
        kept = {name: tensor.clone() for name, tensor in values.items()}
        torch.testing.assert_close(loop(**values)["sample"], expected(values))
        assert all(torch.equal(values[name], kept[name]) for name in values)
    assert graphs.captures == Scaled.made == 2
    assert (loop.stats.captured, loop.stats.eager, loop.stats.replayed) == (2, 2, 4)
    assert told == loop.stats.fallbacks == []


def test_a_capture_that_fails_falls_back_and_says_so(told):
    graphs = FakeGraphs(fail=RuntimeError("operation not permitted when stream is capturing\nmore"))
    loop = CapturedLoop(Scaled, on_fallback=told.append, graphs=graphs)
    for seed in range(3):
        values = inputs(8, seed)
        torch.testing.assert_close(loop(**values)["sample"], expected(values))
    assert (loop.stats.captured, loop.stats.eager, loop.stats.replayed) == (0, 3, 0)
    assert len(told) == 1
    assert "'x': [8, 4]" in told[0]
    assert told[0].endswith("capture failed: operation not permitted when stream is capturing")


def test_a_bug_in_the_loop_is_no_reason_to_fall_back(told):
    loop = CapturedLoop(Scaled, on_fallback=told.append, graphs=FakeGraphs(fail=KeyError("x")))
    with pytest.raises(KeyError):
        loop(**inputs(8))


@pytest.mark.parametrize("spoil", [1e-2, float("nan"), float("inf")])
def test_a_replay_that_differs_is_never_used(told, spoil):
    graphs = FakeGraphs()
    loop = CapturedLoop(lambda: Spoiled(graphs, spoil), on_fallback=told.append, graphs=graphs)
    for seed in range(2):
        values = inputs(8, seed)
        torch.testing.assert_close(loop(**values)["sample"], expected(values))
    assert loop.stats.captured == loop.stats.replayed == 0
    assert "the first replay differs from the eager run: sample by" in told[0]


def test_a_replay_within_tolerance_is_used(told):
    graphs = FakeGraphs()
    loop = CapturedLoop(
        lambda: Spoiled(graphs, 1e-6), on_fallback=told.append, graphs=graphs, tolerance=1e-4
    )
    loop(**inputs(8))
    assert loop.stats.captured == 1


def test_a_known_refusal_is_not_tried(told):
    graphs = FakeGraphs()
    loop = CapturedLoop(
        Scaled, on_fallback=told.append, graphs=graphs, refusal=lambda: "denoiser holds a loop"
    )
    loop(**inputs(8))
    assert graphs.captures == 0
    assert told[0].endswith("denoiser holds a loop")


def test_the_number_of_graphs_is_bounded(told):
    graphs = FakeGraphs()
    loop = CapturedLoop(Scaled, on_fallback=told.append, graphs=graphs, max_graphs=2)
    for rows in (1, 2, 3, 4, 3, 1):
        loop(**inputs(rows))
    assert graphs.captures == 2
    assert len(told) == 2
    assert "use fewer row buckets" in told[0]
    assert (loop.stats.eager, loop.stats.replayed) == (5, 1)


def test_a_session_error_during_capture_falls_back(told):
    loop = CapturedLoop(
        Scaled, on_fallback=told.append, graphs=FakeGraphs(fail=CspdError("refused"))
    )
    loop(**inputs(8))
    assert told[0].endswith("capture failed: refused")


def test_each_graph_has_a_context_that_sees_one_shape(graph: GetGraph, told):
    """The denoising loop over forks of a session: no context runs with two shapes."""
    tiny = graph("denoiser", "fp32")
    engine = FakeEngine(tiny)
    loaded = LoadedEngine(engine, engine.new_context)
    session = TrtSession(tiny.spec, loaded, device=CPU, streams=FakeStreams())
    shapes: dict[int, set] = {}

    def make_run() -> Callable[..., dict[str, Tensor]]:
        fork = session.fork()

        def run(x: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
            for step in reversed(range(2)):
                index = torch.full((len(x),), step, dtype=torch.int32)
                x = fork(x=x, step=index, **conditions)["mean"].clone()
            shapes.setdefault(id(fork), set()).add(tuple(x.shape))
            return {"sample": x}

        return run

    loop = CapturedLoop(
        make_run, on_fallback=told.append, graphs=FakeGraphs(), refusal=session.capture_refusal
    )
    for seed, rows in enumerate([4, 8, 4, 8]):
        sizes = {"rows": rows, "tokens": 3, "branches": 2, "steps": 2}
        values = tiny.spec.example_inputs(sizes, seed)
        values["schedule"] *= 0.1
        del values["step"]
        result = loop(**values)["sample"]
        x = values.pop("x")
        with torch.inference_mode():
            for step in reversed(range(2)):
                index = torch.full((rows,), step, dtype=torch.int32)
                x = tiny.module(
                    x, index, *(values[n] for n in ("token", "conditions", "guidance", "schedule"))
                )[0]
        torch.testing.assert_close(result, x, rtol=1e-3, atol=1e-3)
    assert loop.stats.captured == 2
    assert loop.stats.replayed == 2
    assert [len(seen) for seen in shapes.values()] == [1, 1]
    assert told == []


def test_relative_error():
    one = torch.tensor([3.0, 4.0])
    assert relative_error(one * 1.5, one) == pytest.approx(0.5)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(one, torch.zeros(2)) == 5
    assert not relative_error(one * float("nan"), one) <= 1


@pytest.mark.gpu
def test_a_real_graph_replays_what_ran_eagerly(told):

    def make_run() -> Callable[..., dict[str, Tensor]]:
        return lambda x, scale: {"sample": x * scale**STEPS}

    loop = CapturedLoop(make_run, on_fallback=told.append, graphs=TorchGraphs())
    with torch.cuda.stream(torch.cuda.Stream()):
        for seed in range(3):
            values = {name: tensor.cuda() for name, tensor in inputs(8, seed).items()}
            torch.testing.assert_close(loop(**values)["sample"], expected(values))
    assert (loop.stats.captured, loop.stats.replayed) == (1, 2)
    assert told == []
