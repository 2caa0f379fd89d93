"""Sessions of PyTorch and ONNX Runtime: same answers, same refusals, time counted."""

import re
import sys

import pytest
import torch
from onnx import helper
from tiny_graphs import GetGraph, write_onnx, xy_spec

from cspd.engines.errors import CspdError, MissingExtraError
from cspd.engines.sessions.ort import OrtBoundSession, ort_session
from cspd.engines.sessions.session import TimedSession, TorchSession

# "bound" is the way to CUDA, with the CPU as its device.
BACKENDS = ["torch", "onnxruntime", "bound"]


class Double(torch.nn.Module):
    def forward(self, x):
        return x + x


def make_session(backend, folder):
    if backend == "torch":
        return TorchSession(xy_spec(), Double(), torch.device("cpu"))
    path = write_onnx(folder / "double.onnx", [helper.make_node("Add", ["x", "x"], ["y"])])
    session = ort_session(str(path), xy_spec(), threads=1)
    if backend == "bound":
        return OrtBoundSession(session._session, session.spec, torch.device("cpu"))
    return session


@pytest.fixture(params=BACKENDS)
def session(request, tmp_path):
    return make_session(request.param, tmp_path)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_runs_at_every_size_of_its_range(session, rows):
    x = torch.arange(4.0 * rows).reshape(rows, 4)
    kept = x.clone()
    outputs = session(x=x)
    assert list(outputs) == ["y"]
    assert torch.equal(outputs["y"], 2 * kept)
    assert torch.equal(x, kept)


def test_strided_input(session):
    x = torch.arange(8.0).reshape(4, 2).T
    assert not x.is_contiguous()
    assert torch.equal(session(x=x)["y"], 2 * x)


def test_outputs_of_two_calls_are_apart(session):
    first = session(x=torch.ones(2, 4))["y"]
    session(x=torch.zeros(2, 4))
    assert torch.equal(first, torch.full((2, 4), 2.0))


WRONG = {
    "no input": ({}, ["got inputs []", "expected ['x']"]),
    "wrong name": ({"y": torch.ones(2, 4)}, ["got inputs ['y']", "expected ['x']"]),
    "one more": ({"x": torch.ones(2, 4), "z": torch.ones(1)}, ["'z'", "expected ['x']"]),
    "dtype": ({"x": torch.ones(2, 4).double()}, ["x is torch.float64 [2, 4]", "float32"]),
    "rank": ({"x": torch.ones(2, 2, 4)}, ["x is torch.float32 [2, 2, 4]", "['rows', 4]"]),
    "fixed size": ({"x": torch.ones(2, 5)}, ["x is [2, 5]", "expected 4"]),
    "too many rows": ({"x": torch.ones(9, 4)}, ["x is [9, 4]", "rows in 1..8"]),
    "no rows": ({"x": torch.ones(0, 4)}, ["x is [0, 4]", "rows in 1..8"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(session, case):
    tensors, fragments = WRONG[case]
    with pytest.raises(CspdError) as caught:
        session(**tensors)
    message = str(caught.value)
    assert message.startswith("hand_made: ") and "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_outputs_are_matched_to_the_spec_by_name(tmp_path):
    """Two outputs of a graph, in the file in the other order than in the contract."""
    y, z = (helper.make_tensor_value_info(name, 1, ("rows", 4)) for name in "yz")
    x = helper.make_tensor_value_info("x", 1, ("rows", 4))
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    graph = helper.make_graph(nodes, "two", [x], [z, y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "two.onnx").write_bytes(model.SerializeToString())
    spec = xy_spec()
    both = (spec.outputs[0], spec.outputs[0].model_copy(update={"name": "z"}))
    session = ort_session(str(tmp_path / "two.onnx"), xy_spec(outputs=both), threads=1)
    outputs = session(x=torch.ones(1, 4))
    assert outputs["y"].tolist() == [[2.0] * 4] and outputs["z"].tolist() == [[-1.0] * 4]


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 20])
def test_file_that_is_no_graph(tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(CspdError, match=re.escape(f"{path}: onnxruntime cannot load it")):
        ort_session(str(path), xy_spec())


def test_missing_library_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError) as caught:
        ort_session(str(tmp_path / "any.onnx"), xy_spec())
    assert "onnxruntime is not installed" in str(caught.value)
    assert "pip install 'cspd[cpu]'" in str(caught.value)


def test_cuda_without_the_gpu_build_names_the_pip_command(tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(CspdError, match=r"no CUDAExecutionProvider; .*pip install 'cspd\[gpu\]'"):
        ort_session(str(tmp_path / "any.onnx"), xy_spec(), device="cuda")


def test_timed_session_counts_calls_and_time(session):
    ticks = iter([0.0, 1.5, 10.0, 10.25])
    timed = TimedSession(session, clock=lambda: next(ticks))
    assert timed.spec == session.spec and timed.device == session.device
    for _ in range(2):
        assert torch.equal(timed(x=torch.ones(1, 4))["y"], torch.full((1, 4), 2.0))
    assert (timed.stats.calls, timed.stats.seconds) == (2, 1.75)


def test_refused_call_is_not_counted(session):
    timed = TimedSession(session)
    with pytest.raises(CspdError):
        timed(x=torch.ones(1, 3))
    assert timed.stats.calls == 0


@pytest.mark.parametrize("visible", [0, 3])
def test_bound_tensors_give_the_same_also_where_one_is_empty(graph: GetGraph, visible):
    tiny = graph("backbone", "fp32")
    plain = ort_session(str(tiny.path), tiny.spec, threads=1)
    bound = OrtBoundSession(plain._session, tiny.spec, torch.device("cpu"))
    inputs = tiny.spec.example_inputs({"batch": 2, "visible": visible, "positions": 3})
    assert torch.equal(bound(**inputs)["z"], plain(**inputs)["z"])


def test_bound_tensors_must_lie_on_the_device(tmp_path):
    session = make_session("bound", tmp_path)
    with pytest.raises(CspdError, match="x lies on meta, expected cpu"):
        session(x=torch.ones(2, 4, device="meta"))
