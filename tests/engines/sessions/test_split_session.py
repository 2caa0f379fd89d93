"""Sessions cut along their independent axis: the same answer as one call, each part once."""

import threading

import pytest
import torch

from cspd.engines.errors import CspdError
from cspd.engines.sessions.session import TorchSession
from cspd.engines.sessions.split import SplitSession
from cspd.engines.spec import Axis, GraphSpec, TensorSpec

SPEC = GraphSpec(
    name="scale",
    inputs=(
        TensorSpec(name="x", shape=("rows", 3)),
        TensorSpec(name="noise", shape=("steps", "rows", 3)),
        TensorSpec(name="table", shape=("steps",)),
    ),
    outputs=(
        TensorSpec(name="sum", shape=("rows", 3)),
        TensorSpec(name="steps", shape=("steps", "rows")),
    ),
    axes={"rows": Axis(min=1, opt=4, max=64), "steps": Axis(min=1, opt=2, max=8)},
    independent="rows",
)


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, noise, table):
        self.calls.append((len(x), threading.get_ident()))
        weighted = noise * table[:, None, None]
        return x + weighted.sum(0), weighted.sum(-1)


def example(rows):
    generator = torch.Generator().manual_seed(rows)
    return {
        "x": torch.randn(rows, 3, generator=generator),
        "noise": torch.randn(5, rows, 3, generator=generator),
        "table": torch.rand(5, generator=generator),
    }


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("copies", [2, 3, 4])
def test_parts_give_the_answer_of_one_call(rows, copies):
    modules = [Scale() for _ in range(copies)]
    split = SplitSession(SPEC, [TorchSession(SPEC, m, torch.device("cpu")) for m in modules])
    inputs = example(rows)
    outputs = split(**inputs)
    expected = Scale()(**inputs)
    assert list(outputs) == ["sum", "steps"]
    for got, wanted in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    widths = [module.calls[0][0] for module in modules if module.calls]
    assert sum(widths) == rows
    assert max(widths) == -(-rows // copies)
    assert all(len(module.calls) <= 1 for module in modules)
    if len(widths) > 1:
        assert len({module.calls[0][1] for module in modules if module.calls}) > 1


def test_wrong_shapes_are_refused_before_any_part_runs():
    modules = [Scale(), Scale()]
    split = SplitSession(SPEC, [TorchSession(SPEC, m, torch.device("cpu")) for m in modules])
    with pytest.raises(CspdError, match="rows"):
        split(**{**example(4), "x": torch.zeros(3, 3)})
    assert not any(module.calls for module in modules)


def test_an_error_in_a_part_is_raised():
    class Fails(torch.nn.Module):
        def forward(self, x, noise, table):
            raise CspdError("scale: broken")

    sessions = [TorchSession(SPEC, m, torch.device("cpu")) for m in (Scale(), Fails())]
    with pytest.raises(CspdError, match="broken"):
        SplitSession(SPEC, sessions)(**example(4))


def test_an_independent_axis_must_be_in_every_output():
    with pytest.raises(ValueError, match="independent"):
        GraphSpec.model_validate(SPEC.model_dump() | {"independent": "steps"})
