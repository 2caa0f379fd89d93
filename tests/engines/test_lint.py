"""Lint of exported graphs: each rule on a graph that breaks it, and none on those we export."""

import onnx
import pytest
from onnx import TensorProto, helper
from tiny_graphs import GetGraph, write_onnx, xy_spec

from cspd.engines.errors import CspdError
from cspd.engines.lint import lint_model, refuse_errors
from cspd.engines.spec import Axis, GraphSpec, TensorSpec

RELU = helper.make_node("Relu", ["x"], ["y"], name="relu")


def found(findings) -> list[tuple[str, str]]:
    return [(finding.rule, finding.severity) for finding in findings]


@pytest.mark.parametrize("name", ["backbone", "denoiser", "denoiser_loop", "decoder"])
def test_our_graphs_are_clean(graph: GetGraph, name):
    tiny = graph(name, "fp32")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert lint_model(tiny.path, tiny.spec, "tensorrt-rtx") == []


def test_a_loop_in_a_graph_for_cuda_graphs_is_an_error(graph: GetGraph):
    tiny = graph("denoiser_loop", "fp32")
    capturable = tiny.spec.model_copy(update={"capturable": True})
    (finding,) = lint_model(tiny.path, capturable, None)
    assert (finding.rule, finding.severity) == ("control-flow", "error")
    assert "is a Scan" in finding.message
    assert found(lint_model(tiny.path, None, None)) == [("control-flow", "warning")]


def test_control_flow_inside_control_flow_is_found(tmp_path):
    inner = helper.make_node(
        "If", ["c"], ["y"], name="inner", **branches([relu_branch(), relu_branch()])
    )
    branch = helper.make_graph([inner], "b", [], [value("y")])
    outer = helper.make_node("If", ["c"], ["y"], name="outer", **branches([branch, branch]))
    constant = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 9, [], [1]))
    path = write_onnx(tmp_path / "if.onnx", [constant, outer])
    messages = [finding.message for finding in lint_model(path, xy_spec(), None)]
    assert [message.split()[1] for message in messages] == ["outer", "inner", "inner"]


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 4])


def relu_branch() -> onnx.GraphProto:
    return helper.make_graph([RELU], "r", [], [value("y")])


def branches(pair: list) -> dict:
    return {"then_branch": pair[0], "else_branch": pair[1]}


def test_int64_at_the_border(tmp_path):
    index = helper.make_tensor_value_info("index", TensorProto.INT64, ["rows"])
    out = helper.make_tensor_value_info("out", TensorProto.INT64, ["rows"])
    node = helper.make_node("Add", ["index", "index"], ["out"], name="add")
    model = helper.make_model(helper.make_graph([node], "g", [index], [out]))
    onnx.save(model, tmp_path / "int64.onnx")
    spec = GraphSpec(
        name="g",
        inputs=(TensorSpec(name="index", dtype="int32", shape=("rows",)),),
        outputs=(TensorSpec(name="out", dtype="int32", shape=("rows",)),),
        axes={"rows": Axis(min=1, opt=1, max=2)},
    )
    assert found(lint_model(tmp_path / "int64.onnx", spec, None)) == [("int64", "error")] * 2
    assert found(lint_model(tmp_path / "int64.onnx", None, None)) == [("int64", "warning")] * 2


@pytest.mark.parametrize(
    ("sizes", "changes", "words"),
    [
        ((3, 4), {}, "x ['rows', 4]: rows is frozen at 3"),
        (("rows", "any"), {}, "x ['rows', 4]: got size dynamic for 4"),
        (("rows", 5), {}, "x ['rows', 4]: got size 5 for 4"),
        (("rows", 4, 1), {}, "x has 3 axes"),
        (("rows", 4), {"inputs": (TensorSpec(name="u", shape=("rows", 4)),)}, "input u is missing"),
        (
            ("rows", 4),
            {"inputs": (TensorSpec(name="x", dtype="int32", shape=("rows", 4)),)},
            "x has ONNX type 1, expected int32",
        ),
    ],
)
def test_breaches_of_the_contract(tmp_path, sizes, changes, words):
    path = write_onnx(tmp_path / "x.onnx", [RELU], sizes)
    assert words in lint_model(path, xy_spec(**changes), None)[0].message


def test_two_axes_behind_one_symbol(tmp_path):
    path = write_onnx(tmp_path / "tied.onnx", [RELU], ("n", "n"))
    shape, axis = ("rows", "columns"), Axis(min=1, opt=2, max=8)
    spec = xy_spec(
        inputs=(TensorSpec(name="x", shape=shape),),
        outputs=(TensorSpec(name="y", shape=shape),),
        axes={"rows": axis, "columns": axis},
    )
    (finding,) = lint_model(path, spec, None)
    assert finding.rule == "dynamic-axis"
    assert "columns is tied to rows" in finding.message


def test_the_real_parser_names_an_unsupported_operator(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    determinant = helper.make_node("Det", ["x"], ["y"], name="determinant")
    path = write_onnx(tmp_path / "det.onnx", [determinant], ("rows", 4, 4))
    (finding,) = lint_model(path, None, "tensorrt-rtx")
    assert (finding.rule, finding.severity) == ("parser", "error")
    assert "node determinant (Det): UNSUPPORTED_NODE" in finding.message
    with pytest.raises(CspdError, match="draft/x: cannot be built:\n  parser: node determinant"):
        refuse_errors("draft/x", [finding])


def test_warnings_alone_do_not_refuse(graph: GetGraph):
    refuse_errors("loop", lint_model(graph("denoiser_loop", "fp32").path, None, None))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x08\x09"])
def test_files_that_are_not_onnx(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(CspdError, match="is not an ONNX file"):
        lint_model(path, None, None)


def test_a_missing_file(tmp_path):
    with pytest.raises(CspdError, match=r"x\.onnx: cannot be read: No such file"):
        lint_model(tmp_path / "x.onnx", None, None)


@pytest.mark.parametrize("name", ["x.json", "x.textproto", "x.onnxtxt"])
def test_a_file_is_judged_by_what_it_holds_not_by_its_name(tmp_path, name):
    (tmp_path / name).write_text('{"a": 1}')
    with pytest.raises(CspdError, match="is not an ONNX file"):
        lint_model(tmp_path / name, None, None)
    write_onnx(tmp_path / "x.onnx", [RELU]).rename(tmp_path / name)
    assert lint_model(tmp_path / name, None, None) == []
