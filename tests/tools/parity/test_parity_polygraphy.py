"""Tensor by tensor through Polygraphy: ONNX Runtime against itself here, TensorRT on a GPU."""

import importlib.util
import os

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from cspd.engines.errors import CspdError, MissingExtraError
from cspd.export.cli import main
from cspd.tools.parity import with_polygraphy as polygraphy
from cspd.tools.parity.with_polygraphy import Comparison, TensorError, compare_files, mark_all

WIDTH = 8


def write_graph(path, scale: float = 1.0):
    """Two layers; `scale` multiplies the weights of the second one."""
    weights = np.random.default_rng(0).normal(size=(2, WIDTH, WIDTH)).astype(np.float32)
    weights[1] *= scale
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["first"], name="first"),
        helper.make_node("Relu", ["first"], ["hidden"], name="relu"),
        helper.make_node("Shape", ["hidden"], ["shape"], name="shape"),
        helper.make_node("MatMul", ["hidden", "w1"], ["second"], name="second"),
        helper.make_node("Reshape", ["second", "shape"], ["y"], name="reshape"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in "xy")
    initial = [numpy_helper.from_array(weights[i], f"w{i}") for i in range(2)]
    graph = helper.make_graph(nodes, "layers", [x], [y], initial)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))}


def test_the_first_tensor_that_differs_is_named(tmp_path):
    """Real runs of Polygraphy; only what follows the changed weight differs, by the factor."""
    sound, changed = write_graph(tmp_path / "a.onnx"), write_graph(tmp_path / "b.onnx", 1.01)
    tensors = compare_files((sound, changed), ("onnxruntime", "onnxruntime"), inputs())
    assert [(t.name, t.op) for t in tensors] == [
        ("first", "MatMul"), ("hidden", "Relu"), ("second", "MatMul"), ("y", "Reshape"),
    ]  # fmt: skip
    assert [t.error for t in tensors[:2]] == [0, 0]
    assert [t.error for t in tensors[2:]] == pytest.approx([0.01, 0.01], rel=1e-3)
    comparison = Comparison("layers", tensors, 1e-4)
    assert comparison.first == tensors[2]
    assert comparison.text == "layers: leaves 1e-04 first at MatMul second by 1.0e-02"
    assert Comparison("layers", tensors, 0.02).first is None


def test_what_polygraphy_says_is_in_the_error(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(CspdError, match=r"--polygraphy: onnxruntime failed on broken\.onnx:\n  "):
        polygraphy.save_inputs(inputs(), tmp_path / "in.json")
        polygraphy.run(path, "onnxruntime", tmp_path / "in.json", tmp_path / "out.json")


def test_only_floats_are_marked(tmp_path):
    marked, operators = mark_all(write_graph(tmp_path / "a.onnx"), tmp_path)
    assert list(operators) == ["first", "hidden", "second", "y"]
    assert {v.name for v in onnx.load(marked).graph.output} == set(operators)


def test_weights_larger_than_protobuf_allows_are_marked(tmp_path):
    """As those of mar-h's transformer in float32; a file of holes takes no room on the disk."""
    model, rows = onnx.load(write_graph(tmp_path / "a.onnx")), (2 << 30) // (4 * WIDTH) + 1
    weight = model.graph.initializer.add(
        name="wide", dims=[rows, WIDTH], data_type=TensorProto.FLOAT,
        data_location=TensorProto.EXTERNAL,
    )  # fmt: skip
    weight.external_data.add(key="location", value="weights.safetensors")
    model.graph.node.append(helper.make_node("Gather", ["wide", "shape"], ["row"], name="row"))
    onnx.save(model, tmp_path / "a.onnx")
    with (tmp_path / "weights.safetensors").open("wb") as file:
        file.truncate(4 * WIDTH * rows)
    (tmp_path / "marked").mkdir()
    marked, operators = mark_all(tmp_path / "a.onnx", tmp_path / "marked")
    assert operators["row"] == "Gather"
    assert (marked.parent / "weights.safetensors").stat().st_size > 2 << 30


def test_not_a_number_leaves_every_tolerance():
    tensors = (TensorError("a", "Add", 0.0), TensorError("b", "Log", float("nan")))
    assert Comparison("g", tensors, 1e9).first == tensors[1]


def test_each_flavour_has_a_process_of_its_own(tmp_path):
    arguments = (tmp_path / "m.onnx", "tensorrt-rtx", tmp_path / "i.json", tmp_path / "o.json")
    line = polygraphy.command(*arguments)
    assert line[3:] == [
        "run", str(arguments[0]), "--trt", "--strongly-typed",
        "--load-inputs", str(arguments[2]), "--save-outputs", str(arguments[3]),
    ]  # fmt: skip
    assert polygraphy.environment("tensorrt-rtx")["POLYGRAPHY_USE_TENSORRT_RTX"] == "1"
    assert polygraphy.environment("tensorrt")["POLYGRAPHY_USE_TENSORRT_RTX"] == "0"
    assert os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX") is None
    # An engine of a bundle cannot be named: no option of the call loads one.
    assert not any("engine" in word for word in line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu_it_refuses_in_one_line(backend):
    result = CliRunner().invoke(main, ["parity", "--polygraphy", "--backend", backend])
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: --polygraphy: {backend} runs on a GPU, and torch sees none; run cspd-run doctor\n"
    )


def test_without_polygraphy_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cspd\[polygraphy\]'"):
        polygraphy.check_ready("onnxruntime")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_real_engine_agrees(tmp_path, backend):
    pytest.importorskip(backend.replace("-", "_"), reason=f"{backend} is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    path = write_graph(tmp_path / "a.onnx")
    tensors = compare_files((path, path), ("onnxruntime", backend), inputs())
    assert len(tensors) == 4
    assert Comparison("layers", tensors, 1e-4).first is None
