"""Outputs against the contract, whatever runs the graph."""

from types import SimpleNamespace

import pytest
import torch
from fake_gpu import FakeEngine, FakeStreams
from onnx import helper
from tiny_graphs import narrowed, write_onnx, xy_spec

from cspd.engines.errors import BundleError, CspdError
from cspd.engines.sessions.interface import MAX_KNOWN, CallCheck, Declared, check_interface
from cspd.engines.sessions.ort import OrtBoundSession, ort_session
from cspd.engines.sessions.session import TorchSession
from cspd.engines.sessions.split import SplitSession
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.engines.trt.load import LoadedEngine
from cspd.engines.trt.session import TrtSession

CPU = torch.device("cpu")
SPEC = xy_spec(independent="rows")
# Twice as many rows as promised, by a shape that is known only when the graph runs.
DOUBLED = [
    helper.make_node("Shape", ["x"], ["shape"]),
    helper.make_node("Constant", [], ["two"], value_ints=[2, 1]),
    helper.make_node("Mul", ["shape", "two"], ["size"]),
    helper.make_node("Expand", ["mean", "size"], ["y"]),
]


def wrong_file(folder):
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=1), *DOUBLED]
    return write_onnx(folder / "doubled.onnx", nodes)


def sessions(path) -> dict:
    plain = ort_session(str(path), SPEC, threads=1)
    engine = FakeEngine(SimpleNamespace(path=path, spec=SPEC))
    return {
        "cpu": plain,
        "bound": OrtBoundSession(plain._session, SPEC, CPU),
        "split": SplitSession(SPEC, [plain, ort_session(str(path), SPEC, threads=1)]),
        "engine": TrtSession(
            SPEC, LoadedEngine(engine, engine.new_context), device=CPU, streams=FakeStreams()
        ),
    }


@pytest.mark.parametrize("kind", ["cpu", "bound", "split", "engine"])
def test_no_session_returns_more_rows_than_it_should(tmp_path, kind):
    session = sessions(wrong_file(tmp_path))[kind]
    for _ in range(2):  # what was refused is not remembered as fine
        with pytest.raises(CspdError, match=r"hand_made.*(\[8, 4\]|\{8,4\}|\[4, 4\])"):
            session(x=torch.ones(4, 4))


RETURNED = {
    "rank": lambda x: x[None], "rows": lambda x: x[:1], "channels": lambda x: x[:, :3],
    "float64": lambda x: x.double(), "int64": lambda x: x.long(), "scalar": lambda x: x.sum(),
    "empty": lambda x: x[:0], "two": lambda x: (x, x), "none": lambda x: (),
}  # fmt: skip


@pytest.mark.parametrize("case", RETURNED)
def test_a_module_that_breaks_its_contract(case):
    class Module(torch.nn.Module):
        def forward(self, x):
            return RETURNED[case](x)

    with pytest.raises(CspdError, match="hand_made"):
        TorchSession(SPEC, Module(), CPU)(x=torch.ones(2, 4))


DECLARED = {
    "name": (Declared("z", "float32", (None, 4)), r"outputs \['z'\], expected \['y'\]"),
    "type": (Declared("y", "tensor(double)", (None, 4)), r"y of the graph is tensor\(double\)"),
    "rank": (Declared("y", "float32", (None, 4, 1)), r"float32 \['\?', 4, 1\], expected float32"),
    "size": (Declared("y", "float32", (None, 5)), r"expected float32 \['rows', 4\]"),
    "frozen axis": (Declared("y", "float32", (2, 4)), r"float32 \[2, 4\], expected float32"),
}


@pytest.mark.parametrize("case", DECLARED)
def test_what_a_runtime_tells_is_compared_at_opening(case):
    found, words = DECLARED[case]
    with pytest.raises(BundleError, match=words + ".*rebuild it with cspd-export build"):
        check_interface(SPEC, [Declared("x", "float32", (None, 4))], [found])


def test_unknown_sizes_and_axes_of_one_size_are_fine():
    x = Declared("x", "float32", (None, 4))
    check_interface(SPEC, [x], [Declared("y", "float32", (None, None))])
    one = narrowed(SPEC, rows=(2, 2, 2))
    check_interface(one, [x], [Declared("y", "float32", (2, 4))])


def test_the_graph_is_compared_before_it_runs(tmp_path):
    path = write_onnx(tmp_path / "g.onnx", [helper.make_node("Add", ["x", "x"], ["y"])])
    other = xy_spec(inputs=(TensorSpec(name="v", shape=("rows", 4)),))
    with pytest.raises(BundleError, match=r"inputs \['x'\], expected \['v'\]"):
        ort_session(str(path), other, threads=1)
    integers = xy_spec(outputs=(TensorSpec(name="y", dtype="int32", shape=("rows", 4)),))
    with pytest.raises(BundleError, match="y of the graph is float32"):
        ort_session(str(path), integers, threads=1)
    engine = FakeEngine(SimpleNamespace(path=path, spec=SPEC))
    with pytest.raises(BundleError, match="y of the graph is float32"):
        TrtSession(integers, LoadedEngine(engine, engine.new_context), device=CPU)


def test_shapes_seen_before_are_looked_up():
    check = CallCheck(narrowed(SPEC, rows=(1, 2, 4 * MAX_KNOWN)))
    first = check.inputs({"x": torch.ones(2, 4)})
    assert check.inputs({"x": torch.zeros(2, 4)}) is first
    assert first == {"y": (torch.float32, torch.Size([2, 4]))}
    for rows in range(1, MAX_KNOWN + 10):
        check.inputs({"x": torch.empty(rows, 4)})
    with pytest.raises(CspdError, match="expected float32"):
        check.inputs({"x": torch.ones(2, 4).double()})


def test_an_output_with_an_axis_that_no_input_has_is_no_contract():
    with pytest.raises(ValueError, match=r"no input tells the size of \['free'\]"):
        GraphSpec(
            name="g", inputs=(), outputs=(TensorSpec(name="y", shape=("free",)),),
            axes={"free": Axis(min=1, opt=1, max=1)},
        )  # fmt: skip
