"""The whole speculative loop as one ONNX graph against the reference, round after round."""

import onnx_ir as ir
import pytest
import torch
from quiet_head import quiet_head
from small_head import CONFIG, CPU, SCHEDULE, tokens

from cspd.engines.sessions.ort import ort_session
from cspd.engines.sessions.session import TorchSession
from cspd.export.graphs.speculative_loop import SpeculativeLoopGraph, speculative_loop_spec
from cspd.export.onnx.loop import export_speculative_loop
from cspd.runtime.heads import speculative_loop as lossless_loop
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative_loop import SpeculativeLoopHead
from cspd.runtime.noise import Noise

SPEC = speculative_loop_spec(CONFIG, 512)
INTEGERS = ("next_step", "moved", "drawn")


@pytest.fixture(scope="module")
def graph():
    return SpeculativeLoopGraph(quiet_head(CONFIG))


@pytest.fixture(scope="module")
def model(graph):
    return export_speculative_loop(graph, SPEC)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("loop") / "loop.onnx"
    ir.save(model, path)
    return ort_session(str(path), SPEC, threads=1)


class Recorder:
    """The reference as a session that keeps the inputs of every call."""

    def __init__(self, graph):
        self.session, self.spec, self.device = TorchSession(SPEC, graph, CPU), SPEC, CPU
        self.calls = []

    def __call__(self, **tensors):
        self.calls.append(tensors)
        return self.session(**tensors)


def recorded(graph, count=7, branches=2, **options):
    """Inputs of all calls of one run of the head."""
    recorder = Recorder(graph)
    head = SpeculativeLoopHead(recorder, SpeculationOptions(**options))
    head(tokens(count, branches), SCHEDULE, Noise(3))
    return recorder.calls


def compare(got, expected):
    for name in INTEGERS:
        assert torch.equal(got[name], expected[name]), name
    for tensor in SPEC.outputs:
        if tensor.name not in INTEGERS:
            error = (got[tensor.name] - expected[tensor.name]).norm()
            assert error <= tensor.tolerance * expected[tensor.name].norm(), tensor.name


@pytest.mark.parametrize(
    ("branches", "options"),
    [
        (2, {"window": 6}),
        (1, {"window": 4}),
        (2, {"window": 1}),
        (2, {"window": 8, "row_buckets": (72,)}),
    ],
)
def test_onnx_runtime_agrees(graph, exported, branches, options):
    (inputs,) = recorded(graph, branches=branches, **options)
    expected = TorchSession(SPEC, graph, CPU)(**inputs)
    compare(exported(**inputs), expected)
    assert (expected["next_step"] == -1).all()
    # Drafts were accepted; and, but for windows of one row, refused.
    assert (expected["drawn"] > 0).any() == (options["window"] > 1)
    assert (expected["moved"] > 1).any() == (options["window"] > 1)


def test_goes_on_where_the_candidates_ended(graph, exported, monkeypatch):
    monkeypatch.setattr(lossless_loop, "POOL", 8)
    calls = recorded(graph, window=5)
    assert len(calls) > 2
    for inputs in calls:
        compare(exported(**inputs), TorchSession(SPEC, graph, CPU)(**inputs))


def test_finished_tokens_stay_as_they_are(graph, exported):
    (inputs,) = recorded(graph, window=6)
    inputs = inputs | {"step": inputs["step"].clone()}
    inputs["step"][2] = -1
    for session in (exported, TorchSession(SPEC, graph, CPU)):
        out = session(**inputs)
        for name in ("x", "x0", "fraction", "step"):
            assert torch.equal(out[f"next_{name}"][2], inputs[name][2])
        assert not out["moved"][2].any() and not out["sum_log_std"][2].any()


def test_modulations_are_computed_ahead_of_the_loop(model):
    (loop,) = [node for node in model.graph if node.op_type == "Loop"]
    body = loop.attributes["body"].value
    weights = {
        value.name for node in body for value in node.inputs if value is not None and value.name
    }
    assert any("mlp.0.weight" in name for name in weights)
    assert not any("adaLN" in name or "cond_embed" in name for name in weights)
    # Nor anything else that no round changes: every node of the body follows the state.
    varying = set(body.inputs)
    for node in body:
        assert not varying.isdisjoint(node.inputs), node.name
        varying.update(node.outputs)
