"""Bundles with engines hold the hoisted graphs, with real engines; others do not."""

import pytest
import torch
from safetensors import safe_open

from cspd.engines.backends import open_session
from cspd.engines.onnx_external import external_locations
from cspd.engines.schedule import make_schedule
from cspd.export.graphs.networks import EXACT, HOISTED, HOISTED_ROUND, MODULATION
from cspd.export.verify import compare
from cspd.runtime.contract import check_graphs

ADDED = {MODULATION, HOISTED, HOISTED_ROUND}


def test_all_of_them_have_an_engine(hoisted_bundle, tiny_bundle):
    graphs = hoisted_bundle.manifest.models["target"].graphs
    assert set(graphs) >= ADDED
    for name in ADDED:
        engine = graphs[name].engines["tensorrt-rtx"]
        assert hoisted_bundle.file(engine.file).stat().st_size == engine.bytes > 0
    check_graphs(hoisted_bundle.manifest)
    for model in tiny_bundle.manifest.models.values():
        assert not ADDED & set(model.graphs)


def test_only_the_step_is_in_half_precision(hoisted_bundle):
    record = hoisted_bundle.manifest.models["target"]
    for name in ADDED:
        weights = record.first_weights if name in EXACT else record.weights
        path = hoisted_bundle.graph_file(f"target/{name}")
        assert external_locations(path.read_bytes()) == {weights.partition("/")[2]}
        # Half precision has 11 bits.
        assert (record.graphs[name].measured_error > 2.0**-16) == (name == HOISTED)
    with safe_open(hoisted_bundle.file(record.first_weights), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}
    steps = {
        n: {t.name: t for t in record.graphs[n].spec.inputs}["step"] for n in ADDED - {MODULATION}
    }
    assert steps[HOISTED].spares_last and not steps[HOISTED_ROUND].spares_last


@pytest.mark.parametrize("name", sorted(ADDED))
def test_pytorch_runs_them_too(hoisted_bundle, name):
    label, schedule = f"target/{name}", make_schedule(hoisted_bundle.manifest.schedule, 10)
    sessions = (
        open_session(hoisted_bundle, label, backend) for backend in ("onnxruntime", "torch")
    )
    for output, error in compare(*sessions, schedule).items():
        tolerances = {t.name: t.tolerance for t in hoisted_bundle.graph(label).spec.outputs}
        assert error <= (tolerances[output] or 0), output
