"""Names of external data, read without the onnx library and compared with what onnx reads."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cspd.engines.bundle import open_bundle
from cspd.engines.errors import CspdError
from cspd.engines.onnx_external import external_locations
from cspd.engines.sessions.ort import thread_options
from cspd.runtime.commands.cli import shipped_bundle


def tensor(location: str | None) -> onnx.TensorProto:
    made = onnx.TensorProto(name="w", data_type=1, dims=[1])
    if location is not None:
        made.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("offset", "0"), ("location", location), ("length", "4")):
            made.external_data.add(key=key, value=value)
    return made


def test_every_place_that_can_hold_a_tensor_is_looked_into():
    model = onnx.ModelProto(ir_version=10)
    node = model.graph.node.add(op_type="Scan")
    inner = node.attribute.add(name="body").g
    places = {
        "a": lambda t: model.graph.initializer.append(t),
        "b": lambda t: model.graph.sparse_initializer.add().values.CopyFrom(t),
        "c": lambda t: model.graph.sparse_initializer.add().indices.CopyFrom(t),
        "d": lambda t: node.attribute.add(name="t").t.CopyFrom(t),
        "e": lambda t: node.attribute.add(name="l").tensors.append(t),
        "f": lambda t: inner.initializer.append(t),
        "g": lambda t: node.attribute.add(name="h").graphs.add().initializer.append(t),
        "h": lambda t: inner.node.add().attribute.add(name="s").sparse_tensor.values.CopyFrom(t),
        "i": lambda t: node.attribute.add(name="r").sparse_tensors.add().values.CopyFrom(t),
        "j": lambda t: model.functions.add().node.add().attribute.add(name="v").t.CopyFrom(t),
        "k": lambda t: model.functions.add().attribute_proto.add(name="w").t.CopyFrom(t),
        "l": lambda t: model.training_info.add().algorithm.initializer.append(t),
        "m": lambda t: model.training_info.add().initialization.initializer.append(t),
    }
    for name, put in places.items():
        put(tensor(f"../{name}"))
        put(tensor(None))
    assert external_locations(model.SerializeToString()) == {f"../{name}" for name in places}


def test_shipped_graphs_name_their_weights_only():
    bundle = open_bundle(shipped_bundle())
    for label, graph in bundle.manifest.graphs().items():
        expected = set() if label == "decoder" else {"weights.safetensors"}
        content = bundle.file(graph.file).read_bytes()
        assert external_locations(content) == expected
        model = onnx.load_from_string(content)
        named = {e.value for t in model.graph.initializer for e in t.external_data}
        assert expected >= {value for value in named if not value.isdigit()}


def test_a_name_in_a_split_message_is_found():
    """Protobuf merges fields that come twice; a reader that takes the last would miss the first."""
    first, second = onnx.ModelProto(), onnx.ModelProto()
    first.graph.initializer.append(tensor("../first"))
    second.graph.initializer.append(tensor("../second"))
    both = first.SerializeToString() + second.SerializeToString()
    assert external_locations(both) == {"../first", "../second"}


def field(number: int, content: bytes) -> bytes:
    """A message as a field of another, of up to 16,383 bytes."""
    size = len(content)
    return bytes([number << 3 | 2, *([size & 127 | 128, size >> 7] if size > 127 else [size])]) + (
        content
    )


def adding_hidden(tag: bytes) -> bytes:
    """A model of y = x + w, where w lies in the file "hidden"; its entries have the given tag.

    Put together by hand: protobuf would write the tag in its shortest form again.
    """
    weight = tensor("hidden").SerializeToString()
    assert weight.count(b"\x6a") == 3  # field 13, a message
    sides = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    add = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([add], "g", sides[:1], sides[1:]).SerializeToString()
    graph += field(5, weight.replace(b"\x6a", tag))
    opset = onnx.helper.make_opsetid("", 20)
    model = onnx.ModelProto(ir_version=10, opset_import=[opset])
    return model.SerializeToString() + field(7, graph)


LONG_TAGS = {
    "bit 32 set": b"\xea\x80\x80\x80\x10",
    "needless bytes": b"\xea\x80\x80\x80\x00",
    "one needless byte": b"\xea\x00",
}


@pytest.mark.parametrize("case", LONG_TAGS)
def test_a_tag_in_another_form_hides_nothing(tmp_path, case):
    """ONNX Runtime drops the bits above 32 and the needless bytes, and computes with the file."""
    assert external_locations(adding_hidden(b"\x6a")) == {"hidden"}
    content = adding_hidden(LONG_TAGS[case])
    (tmp_path / "g.onnx").write_bytes(content)
    np.array([2.0], np.float32).tofile(tmp_path / "hidden")
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx", thread_options(onnxruntime, 1))
    assert session.run(None, {"x": np.array([1.0], np.float32)})[0] == [3.0]
    with pytest.raises(CspdError, match="not an ONNX model"):
        external_locations(content)


NUMBERS = {
    "field 0": b"\x02\x00",
    "a tag of 33 bits": b"\x80\x80\x80\x80\x10\x00",
    "a length with needless bytes": b"\x3a\x80\x00",
    "a value with needless bytes": b"\x08\x8a\x00",
    "a value of 65 bits": b"\x08" + b"\xff" * 9 + b"\x02",
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_that_readers_may_take_differently(case):
    with pytest.raises(CspdError, match="not an ONNX model"):
        external_locations(NUMBERS[case])


def test_negative_numbers_have_ten_bytes():
    attribute = onnx.helper.make_attribute("axis", -1)
    node = onnx.NodeProto(op_type="Concat", attribute=[attribute])
    model = onnx.ModelProto(ir_version=2**63 - 1, graph=onnx.GraphProto(node=[node]))
    assert b"\xff" * 9 + b"\x01" in model.SerializeToString()
    assert external_locations(model.SerializeToString()) == set()


@pytest.mark.parametrize("content", [b"\xff" * 11, b"\x0a\x7f", b"\x0b", b"\x0f", b"\x08"])
def test_what_is_no_message(content):
    with pytest.raises(CspdError, match="not an ONNX model"):
        external_locations(content)


@given(st.binary(max_size=60))
def test_any_bytes_end_in_names_or_an_error(content):
    try:
        assert all(isinstance(name, str) for name in external_locations(content))
    except CspdError as error:
        assert "not an ONNX model" in str(error)
