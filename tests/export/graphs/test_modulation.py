"""Hoisted modulations give the denoiser that computes them itself, in PyTorch and through ONNX."""

import math

import onnx
import onnx_ir as ir
import pytest
import torch
from recorded import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.engines.sessions.ort import ort_session
from cspd.engines.sessions.session import TorchSession
from cspd.export.graphs.denoiser import DenoiserGraph, denoiser_spec
from cspd.export.graphs.hoisted_round import hoisted_round_spec
from cspd.export.graphs.modulation import (
    MAX_TABLE_BYTES,
    TABLE_STEPS,
    HeadModulationGraph,
    HoistedDenoiserGraph,
    hoisted_spec,
    modulation_bytes,
    modulation_spec,
)
from cspd.export.mar.model import DiffusionLoss
from cspd.export.mar.presets import PRESETS, MarConfig
from cspd.export.onnx.trace import export_graph

CONFIG = MarConfig(4, 24, 1, 1, 2, head_width=40, head_depth=2)
SCHEDULE = make_schedule(ScheduleSpec(), 12)  # with the ill-conditioned first step
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(1)
    return DiffusionLoss(CONFIG).eval()


@pytest.fixture(scope="module")
def pytorch(head):
    return (
        TorchSession(modulation_spec(CONFIG, 64), HeadModulationGraph(head), CPU),
        TorchSession(hoisted_spec(CONFIG, 64), HoistedDenoiserGraph(head), CPU),
    )


@pytest.fixture(scope="module")
def exported(head, tmp_path_factory):
    folder, sessions = tmp_path_factory.mktemp("modulation"), []
    for graph, spec in (
        (HeadModulationGraph(head), modulation_spec(CONFIG, 64)),
        (HoistedDenoiserGraph(head), hoisted_spec(CONFIG, 64)),
    ):
        ir.save(export_graph(graph, spec), folder / f"{spec.name}.onnx")
        sessions.append(ort_session(str(folder / f"{spec.name}.onnx"), spec, threads=1))
    return sessions


def inputs(branches):
    """Every step of every token once, in no order."""
    generator = torch.Generator().manual_seed(5)
    pairs = torch.randperm(3 * SCHEDULE.num_steps, generator=generator).int()
    return {
        "x": torch.randn(len(pairs), CONFIG.token_dim, generator=generator),
        "step": pairs // 3,
        "token": pairs % 3,
        "conditions": torch.randn(branches, 3, CONFIG.embed_dim, generator=generator),
        "guidance": torch.linspace(1, 4, len(pairs)),
        "schedule": SCHEDULE.table,
    }


@pytest.mark.parametrize("backend", ["pytorch", "exported"])
@pytest.mark.parametrize("branches", [1, 2])
def test_equals_the_denoiser_up_to_rounding(request, head, backend, branches):
    modulate, hoisted = request.getfixturevalue(backend)
    rows = inputs(branches)
    expected = TorchSession(denoiser_spec(CONFIG, 64), DenoiserGraph(head), CPU)(**rows)
    conditions = rows.pop("conditions")
    table = modulate(conditions=conditions, schedule=SCHEDULE.table)["modulation"].clone()
    assert table.nbytes == 3 * modulation_bytes(CONFIG, SCHEDULE.num_steps, branches)
    got = hoisted(**rows, modulation=table)
    for spec in hoisted.spec.outputs:
        error = (got[spec.name] - expected[spec.name]).norm() / expected[spec.name].norm()
        assert error <= spec.tolerance, spec.name


def test_hoisted_denoiser_holds_no_modulation_weights(hoisted_bundle):
    def sizes(name):
        path = hoisted_bundle.graph_file(f"target/{name}")
        weights = onnx.load(path, load_external_data=False).graph.initializer
        return sum(math.prod(weight.dims) for weight in weights)

    width, depth = TINY.head_width, TINY.head_depth
    assert sizes("denoiser") - sizes("denoiser_hoisted") > (3 * depth + 2) * width * width


def test_a_table_stays_below_its_limit():
    """Of every published model, and of one whose tables are small."""
    for config in (*PRESETS.values(), CONFIG):
        axes = modulation_spec(config, 1024).axes
        size = axes["tokens"].max * modulation_bytes(
            config, axes["steps"].max, axes["branches"].max
        )
        one_more = size + modulation_bytes(config, TABLE_STEPS, 2)
        assert size <= MAX_TABLE_BYTES
        assert axes["tokens"].max == 1024 or one_more > MAX_TABLE_BYTES
        for spec in (hoisted_spec(config, 1024), hoisted_round_spec(config, 1024)):
            shapes = {t.name: t.sizes(spec.sizes("max")) for t in spec.inputs}
            assert 4 * math.prod(shapes["modulation"]) == size


def test_modulations_are_one_product_per_layer(head):
    """Not one per token and step, which took fifteen times as long on an H100."""

    class Products(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Products() as products:
        HeadModulationGraph(head)(torch.randn(2, 3, 24), SCHEDULE.table)
    assert "bmm" not in products.seen
    assert products.seen.count("addmm") == 2 + 1 + 3  # time, condition, blocks and last layer
