"""The files themselves: axes, shared weights, no traces of the machine they were made on."""

import math
import re
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from recorded import relative_error
from safetensors.torch import load_file, save_file

import cspd.export
from cspd.engines.errors import CspdError
from cspd.engines.sessions.ort import ort_session
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export.mar.layers import Linear
from cspd.export.onnx.trace import OPSET, export_graph, finish, save_graph, trace_graph

SPEC = GraphSpec(
    name="product",
    inputs=(TensorSpec(name="x", shape=("rows", 64)),),
    outputs=(TensorSpec(name="y", shape=("rows", 64), tolerance=1e-4),),
    axes={"rows": Axis(min=1, opt=2, max=8)},
)


WIDE = 2048  # more than any published model


class Product(torch.nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layer = Linear(64, width).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self.layer.weight.copy_(torch.randn(width, 64, generator=generator))
        self.layer.bias.copy_(torch.randn(width, generator=generator))

    def forward(self, x):
        return self.layer(x)


@pytest.fixture(scope="module")
def graphs(tiny_bundle) -> dict[str, tuple[Path, GraphSpec, onnx.ModelProto]]:
    """Every graph of the bundle: its path, its contract, the file without its weights."""
    return {
        label: (path, record.spec, onnx.load(path, load_external_data=False))
        for label, record in tiny_bundle.manifest.graphs().items()
        for path in [tiny_bundle.graph_file(label)]
    }


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)


def all_nodes(graph: onnx.GraphProto):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)


def test_contract_is_in_the_file(graphs):
    types = {TensorProto.FLOAT: "float32", TensorProto.INT32: "int32"}
    for label, (_, spec, model) in graphs.items():
        assert model.graph.name == spec.name
        for values, tensors in (
            (model.graph.input, spec.inputs),
            (model.graph.output, spec.outputs),
        ):
            assert [value.name for value in values] == [tensor.name for tensor in tensors]
            assert [shape_of(value) for value in values] == [t.shape for t in tensors], label
            got = [types[value.type.tensor_type.elem_type] for value in values]
            assert got == [tensor.dtype for tensor in tensors]


def test_opset_and_operators(graphs):
    for label, (path, spec, model) in graphs.items():
        assert [(o.domain, o.version) for o in model.opset_import if not o.domain] == [("", OPSET)]
        assert not model.functions
        operators = {node.op_type for node in all_nodes(model.graph)}
        assert operators.isdisjoint({"If", "SequenceAt"}), label
        assert ("Scan" in operators) == (spec.name == "denoiser_loop")
        # What engines cannot take is in a graph that is not for them.
        assert spec.engines == operators.isdisjoint({"Loop", "NonZero"})
        assert spec.capturable == operators.isdisjoint({"Scan", "Loop"})
        onnx.checker.check_model(str(path))


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def test_weights_are_those_of_the_safetensors_file(graphs, tiny_bundle):
    """Every large constant of a graph points at the tensor of its name, to the byte."""
    for role in ("target", "draft"):
        file = tiny_bundle.folder / role / "weights.safetensors"
        content, state, used = file.read_bytes(), load_file(file), set()
        for label, (_, _, model) in graphs.items():
            if not label.startswith(role):
                continue
            for tensor in model.graph.initializer:
                if tensor.data_location != TensorProto.EXTERNAL:
                    assert numpy_helper.to_array(tensor).nbytes <= 1024, (label, tensor.name)
                    continue
                place = external(tensor)
                assert place["location"] == "weights.safetensors"
                begin, length = int(place["offset"]), int(place["length"])
                stored = state[tensor.name].contiguous()
                assert tuple(tensor.dims) == stored.shape
                assert content[begin : begin + length] == stored.numpy().tobytes()
                used.add(tensor.name)
        # The optimiser may fold tensors of up to 64 numbers into others.
        assert used >= {name for name, tensor in state.items() if tensor.numel() > 64}


def test_files_name_no_machine_and_no_source(graphs):
    places = [Path(torch.__file__).parents[1], Path(cspd.export.__path__[0]).parent, Path.home()]
    forbidden = [str(place).encode() for place in places if len(str(place)) > 3]
    for label, (path, _, model) in graphs.items():
        content = path.read_bytes()
        for text in (*forbidden, b"site-packages", b'File "', b"Traceback", b"pkg.torch", b"/tmp"):
            assert text not in content, (label, text)
        assert re.search(rb"\w\.py\b", content) is None, label
        assert not model.metadata_props and not model.doc_string and not model.graph.doc_string
        assert all(not node.doc_string for node in all_nodes(model.graph))


def test_manifest_names_no_machine(tiny_bundle):
    text = (tiny_bundle.folder / "manifest.json").read_text()
    assert str(tiny_bundle.folder) not in text and "site-packages" not in text
    assert "/tmp" not in text


@pytest.mark.parametrize("role", ["target", "draft"])
def test_weights_are_written_as_they_came(tiny_bundle, role):
    from tiny_pair import tiny_plan

    stored = load_file(tiny_bundle.folder / role / "weights.safetensors")
    source = tiny_plan().models[role].state
    assert set(stored) == set(source)
    assert all(torch.equal(stored[name], source[name]) for name in source)


def test_frozen_axis_is_an_error():
    """Traced without a free axis, the file would take one size only."""
    traced = trace_graph(Product(), {"x": torch.randn(3, 64)}, ["y"], {})
    with pytest.raises(CspdError, match=r"x: exported shape \[3, ?64\], the contract says"):
        finish(traced, SPEC)


def test_module_that_fixes_an_axis_cannot_be_exported():
    class OnlyThree(torch.nn.Module):
        def forward(self, x):
            return x.reshape(3, 64) + 1

    with pytest.raises(Exception, match=r"(?i)constraint|specializ|dynamic"):
        export_graph(OnlyThree(), SPEC)


def test_free_axis_where_the_contract_has_a_number_is_an_error():
    fixed = SPEC.model_copy(update={"inputs": (TensorSpec(name="x", shape=(3, 64)),)})
    traced = trace_graph(Product(), {"x": torch.randn(3, 64)}, ["y"], {"x": [0]})
    with pytest.raises(CspdError, match="the contract says"):
        finish(traced, fixed)


def test_wrong_name_is_an_error():
    traced = trace_graph(Product(), {"input": torch.randn(3, 64)}, ["y"], {"input": [0]})
    with pytest.raises(CspdError, match="exported input, the contract says x"):
        finish(traced, SPEC)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_half_precision_storage_is_read_through_a_cast(tmp_path, storage):
    module = Product()
    half = {name: tensor.to(storage) for name, tensor in module.state_dict().items()}
    save_file(half, tmp_path / "weights.safetensors")
    save_graph(export_graph(module, SPEC), tmp_path / "g.onnx", tmp_path / "weights.safetensors")
    model = onnx.load(tmp_path / "g.onnx", load_external_data=False)
    types = {t.name: t.data_type for t in model.graph.initializer if external(t)}
    expected = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}[storage]
    assert types == {"layer.weight.stored": expected, "layer.bias.stored": expected}
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 2
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    got = ort_session(str(tmp_path / "g.onnx"), SPEC, threads=1)(x=x)["y"]
    # The rounded weights, computed in float32.
    rounded = x @ half["layer.weight"].float().T + half["layer.bias"].float()
    assert relative_error(got, rounded) < 1e-6
    assert relative_error(got, module(x)) > 1e-5


def test_large_weight_that_is_not_in_the_file_is_an_error(tmp_path):
    wide = SPEC.model_copy(
        update={"outputs": (TensorSpec(name="y", shape=("rows", 32), tolerance=1e-4),)}
    )
    save_file({"other": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CspdError, match=r"weight layer\.weight is not in the weights file"):
        save_graph(
            export_graph(Product(32), wide), tmp_path / "g.onnx", tmp_path / "weights.safetensors"
        )
    assert not (tmp_path / "g.onnx").exists()


def test_constants_of_any_width_are_no_weights(tmp_path):
    """The scale of a norm without one, and positions: both grow with the model."""

    class Reversed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(WIDE, elementwise_affine=False)

        def forward(self, x):
            return self.norm(x).index_select(1, torch.arange(WIDE - 1, -1, -1))

    (tensor_in,), (tensor_out,) = SPEC.inputs, SPEC.outputs
    shape = {"shape": ("rows", WIDE)}
    spec = SPEC.model_copy(
        update={
            "inputs": (tensor_in.model_copy(update=shape),),
            "outputs": (tensor_out.model_copy(update=shape),),
        }
    )
    save_graph(export_graph(Reversed(), spec), tmp_path / "g.onnx", None)
    constants = onnx.load(tmp_path / "g.onnx").graph.initializer
    assert all(math.prod(t.dims) <= 1 for t in constants if t.data_type == TensorProto.FLOAT)
    assert max(numpy_helper.to_array(t).nbytes for t in constants) >= 4 * WIDE
    x = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(2))
    got = ort_session(str(tmp_path / "g.onnx"), spec, threads=1)(x=x)["y"]
    assert relative_error(got, Reversed()(x)) < 1e-6
