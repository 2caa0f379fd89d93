"""The round as one graph against the runtime's reference: equal to the bit, and close in ONNX."""

import onnx_ir as ir
import pytest
import torch
from quiet_head import quiet_head
from reference_round import ReferenceRound
from small_head import CONFIG, CPU, SCHEDULE, tokens

from cspd.engines.sessions.ort import ort_session
from cspd.engines.sessions.session import TorchSession
from cspd.export.graphs.denoiser import DenoiserGraph, denoiser_spec
from cspd.export.graphs.hoisted_round import HoistedRoundGraph, hoisted_round_spec
from cspd.export.graphs.modulation import HeadModulationGraph, modulation_spec
from cspd.export.graphs.round import CANDIDATES
from cspd.export.graphs.speculative_round import SpeculativeRoundGraph, round_spec
from cspd.export.onnx.trace import export_graph
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.noise import Noise

DISCRETE = ("next_step", "moved", "drawn")


@pytest.fixture(scope="module")
def head():
    return quiet_head(CONFIG)


@pytest.fixture(scope="module")
def reference(head):
    return ReferenceRound(TorchSession(denoiser_spec(CONFIG, 512), DenoiserGraph(head), CPU))


@pytest.fixture(scope="module")
def model(head):
    return export_graph(SpeculativeRoundGraph(head), round_spec(CONFIG, 512))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("round") / "round.onnx"
    ir.save(model, path)
    return ort_session(str(path), round_spec(CONFIG, 512), threads=1)


class Recorder:
    """A round session that keeps the inputs of every call."""

    def __init__(self, session):
        self.session, self.calls = session, []

    def __call__(self, **tensors):
        self.calls.append(tensors)
        return self.session(**tensors)


def recorded_inputs(reference, count=9, branches=2, **options):
    """Inputs of all rounds of one run: tokens at many steps, windows of all lengths."""
    recorder = Recorder(reference)
    result = SpeculativeHead(recorder, SpeculationOptions(**options), CONFIG.token_dim)(
        tokens(count, branches), SCHEDULE, Noise(3)
    )
    return recorder.calls, result


@pytest.mark.parametrize(
    ("branches", "options"),
    [(2, {"window": 6}), (1, {"window": 4}), (2, {"window": 8, "row_buckets": (16, 40)})],
)
def test_equals_the_reference_to_the_bit_in_pytorch(head, reference, branches, options):
    graph = TorchSession(round_spec(CONFIG, 512), SpeculativeRoundGraph(head), CPU)
    calls, result = recorded_inputs(reference, branches=branches, **options)
    for inputs in calls:
        expected, got = reference(**inputs), graph(**inputs)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            assert torch.equal(value, got[name]), name
            assert value.dtype == got[name].dtype
    # The comparison has seen acceptances, refusals, and rows that end a window.
    assert 0 < result.stats.accepted.sum() < result.stats.tested.sum()


def test_onnx_runtime_agrees(reference, exported):
    calls, _ = recorded_inputs(reference, window=6)
    decisions = agreed = 0
    for inputs in calls:
        expected, got = reference(**inputs), exported(**inputs)
        same = torch.stack([expected[name] == got[name] for name in DISCRETE]).all(0)
        decisions, agreed = decisions + len(same), agreed + int(same.sum())
        for spec in exported.spec.outputs:
            if spec.name not in DISCRETE:
                error = (expected[spec.name] - got[spec.name])[same].norm()
                assert error <= spec.tolerance * expected[spec.name][same].norm(), spec.name
    # Rounding can turn a test whose number lies within 1e-4 of its bound; none of these does.
    assert agreed == decisions > 50


def test_a_run_through_onnx_runtime_is_the_run_of_the_reference(reference, exported):
    options = SpeculationOptions(window=6)
    runs = [
        SpeculativeHead(session, options, CONFIG.token_dim)(tokens(9), SCHEDULE, Noise(3))
        for session in (reference, exported)
    ]
    assert runs[0].stats.rounds == runs[1].stats.rounds
    torch.testing.assert_close(runs[0].sample, runs[1].sample, rtol=1e-3, atol=1e-3)


def test_a_search_without_an_end_changes_nothing(reference, exported):
    calls, _ = recorded_inputs(reference, window=6)
    # A uniform number of 2 keeps no candidate.
    for inputs in calls:
        refused = reference(**inputs)["drawn"] > 0
        none = inputs | {"choices": torch.full_like(inputs["choices"], 2.0)}
        for session in (reference, exported):
            out = session(**none)
            assert torch.equal(out["drawn"], refused.int() * CANDIDATES)
            assert torch.equal(out["moved"] == 0, refused)
            for name in ("x", "x0", "fraction", "step"):
                assert torch.equal(out[f"next_{name}"][refused], inputs[name][refused])


def test_no_loop_and_no_branch(model, hoisted_model):
    kinds = {node.op_type for graph in (model.graph, hoisted_model.graph) for node in graph}
    assert not kinds & {"Loop", "If", "Scan", "NonZero", "Random"}


@pytest.fixture(scope="module")
def hoisted_model(head):
    return export_graph(HoistedRoundGraph(head), hoisted_round_spec(CONFIG, 512))


@pytest.fixture(scope="module")
def hoisted(head, hoisted_model, tmp_path_factory):
    """The hoisted round in PyTorch and in ONNX Runtime."""
    path, spec = tmp_path_factory.mktemp("hoisted") / "round.onnx", hoisted_round_spec(CONFIG, 512)
    ir.save(hoisted_model, path)
    in_pytorch = TorchSession(spec, HoistedRoundGraph(head), CPU)
    return {"pytorch": in_pytorch, "onnx": ort_session(str(path), spec, threads=1)}


@pytest.mark.parametrize("backend", ["pytorch", "onnx"])
@pytest.mark.parametrize("branches", [1, 2])
def test_hoisted_round_is_the_round_up_to_rounding(head, reference, hoisted, backend, branches):
    """With a table of more tokens than the call has, in another order."""
    modulate = TorchSession(modulation_spec(CONFIG, 512), HeadModulationGraph(head), CPU)
    whole = TorchSession(round_spec(CONFIG, 512), SpeculativeRoundGraph(head), CPU)
    calls, result = recorded_inputs(reference, branches=branches, window=6)
    session = hoisted[backend]
    for inputs in calls:
        expected = whole(**inputs)
        inputs = dict(inputs)
        conditions = inputs.pop("conditions")
        others = torch.full_like(conditions[:, :2], 9.0)
        table = torch.cat([others, conditions.flip(1)], dim=1)
        origin = torch.arange(table.shape[1] - 1, 1, -1, dtype=torch.int32)
        modulation = modulate(conditions=table, schedule=SCHEDULE.table)["modulation"]
        got = session(**inputs, modulation=modulation, origin=origin)
        for spec in session.spec.outputs:
            if spec.name in DISCRETE:
                assert torch.equal(got[spec.name], expected[spec.name]), spec.name
            else:
                error = (got[spec.name] - expected[spec.name]).norm()
                assert error <= spec.tolerance * expected[spec.name].norm(), spec.name
    assert 0 < result.stats.accepted.sum() < result.stats.tested.sum()
