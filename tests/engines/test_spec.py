"""Contract of a graph: ranges, shapes, example inputs, refusal of anything that differs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cspd.engines.errors import CspdError, NonFiniteError
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.engines.words import speaking

SPEC = GraphSpec(
    name="network",
    inputs=(
        TensorSpec(name="x", shape=("rows", 4)),
        TensorSpec(name="index", dtype="int32", shape=("rows", "picked"), below=7, distinct=True),
        TensorSpec(name="owner", dtype="int32", shape=("rows",), below="picked"),
    ),
    outputs=(TensorSpec(name="y", shape=("rows", 4), tolerance=1e-4),),
    axes={"rows": Axis(min=1, opt=2, max=5), "picked": Axis(min=0, opt=3, max=7)},
)
GOOD = {
    "x": torch.zeros(2, 4),
    "index": torch.zeros(2, 3, dtype=torch.int32),
    "owner": torch.zeros(2, dtype=torch.int32),
}


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9))
def test_axis_range_must_be_ordered(low, middle, high):
    if low <= middle <= high:
        assert Axis(min=low, opt=middle, max=high).opt == middle
    else:
        with pytest.raises(ValidationError, match="not ordered"):
            Axis(min=low, opt=middle, max=high)


def test_axis_without_a_range_is_refused():
    with pytest.raises(ValidationError, match=r"axes without a range: \['rows'\]"):
        GraphSpec(name="g", inputs=(TensorSpec(name="x", shape=("rows",)),), outputs=(), axes={})


@pytest.mark.parametrize("name", ["", "X", "1x", "a-b", "a/b", "a.b"])
def test_names_are_plain(name):
    with pytest.raises(ValidationError):
        TensorSpec(name=name, shape=(1,))


def test_specs_are_immutable_and_closed():
    with pytest.raises(ValidationError):
        SPEC.axes["rows"].min = 0
    with pytest.raises(ValidationError, match="Extra inputs"):
        Axis(min=0, opt=1, max=2, step=1)
    with pytest.raises(ValidationError):
        TensorSpec(name="x", dtype="float16", shape=(1,))


def test_survives_json():
    assert GraphSpec.model_validate_json(SPEC.model_dump_json()) == SPEC


@pytest.mark.parametrize(("which", "rows", "picked"), [("min", 1, 0), ("opt", 2, 3), ("max", 5, 7)])
def test_sizes_of_every_axis(which, rows, picked):
    assert SPEC.sizes(which) == {"rows": rows, "picked": picked}


@given(rows=st.integers(1, 5), picked=st.integers(0, 7), seed=st.integers(0, 2**31))
def test_example_inputs_fit_the_contract(rows, picked, seed):
    sizes = {"rows": rows, "picked": picked}
    inputs = SPEC.example_inputs(sizes, seed)
    assert SPEC.bind(inputs) == sizes
    assert inputs["x"].shape == (rows, 4)
    # Distinct indices below 7: as many different values per row as there are columns.
    assert all(len(set(row)) == picked for row in inputs["index"].tolist())
    assert all(0 <= value < 7 for row in inputs["index"].tolist() for value in row)
    assert all(0 <= value < max(picked, 1) for value in inputs["owner"].tolist())
    again = SPEC.example_inputs(sizes, seed)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_bind_returns_axis_sizes():
    assert SPEC.bind(GOOD) == {"rows": 2, "picked": 3}


WRONG = {
    "missing input": ({"owner": None}, ["got inputs ['index', 'x']", "'owner'"]),
    "unknown input": ({"z": torch.zeros(1)}, ["'z'", "expected ['index', 'owner', 'x']"]),
    "dtype": ({"x": torch.zeros(2, 4).half()}, ["x is torch.float16 [2, 4]", "expected float32"]),
    "int64": ({"owner": torch.zeros(2, dtype=torch.int64)}, ["owner is torch.int64", "int32"]),
    "rank": ({"x": torch.zeros(2, 4, 1)}, ["x is torch.float32 [2, 4, 1]", "['rows', 4]"]),
    "fixed size": ({"x": torch.zeros(2, 3)}, ["x is [2, 3]", "expected 4 to be 4"]),
    "disagreement": (
        {"owner": torch.zeros(3, dtype=torch.int32)}, ["owner is [3]", "expected rows to be 2"],
    ),
    "above range": (
        {"index": torch.zeros(2, 8, dtype=torch.int32)}, ["index is [2, 8]", "picked in 0..7"],
    ),
    "below range": ({"x": torch.zeros(0, 4)}, ["x is [0, 4]", "rows in 1..5"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bind_refuses_and_says_what_it_got_and_expected(case):
    changes, fragments = WRONG[case]
    tensors = {name: t for name, t in {**GOOD, **changes}.items() if t is not None}
    with pytest.raises(CspdError) as caught:
        SPEC.bind(tensors)
    message = str(caught.value)
    assert message.startswith("network: ") and "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_output_names_graph_output_and_context(value):
    outputs = {"y": torch.zeros(2, 4), "other": torch.ones(1)}
    assert SPEC.check_finite(outputs, "image 3, step 4") is None
    outputs["y"][1, 2] = value
    with pytest.raises(NonFiniteError, match=r"network: y holds NaN .* at image 3, step 4"):
        SPEC.check_finite(outputs, "image 3, step 4")


@pytest.mark.parametrize(
    ("language", "words"), [("options", "--cfg or --temperature"), ("python", "cfg or temperature")]
)
def test_advice_covers_every_cause_that_is_left(language, words):
    """Settings, number format, finite weights that are too large."""
    with speaking(language), pytest.raises(NonFiniteError) as caught:
        SPEC.check_finite({"y": torch.tensor(float("nan"))}, "image 3")
    message = str(caught.value)
    assert f"Lower {words}; " in message and "parity" not in message
    assert "--precision bf16 or fp32; if it is the same in fp32, its weights" in message
    assert "another checkpoint" in message
