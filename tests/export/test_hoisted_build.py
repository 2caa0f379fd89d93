"""Bundles with engines hold the hoisted graphs, with real engines; others do not."""

import pytest
import torch
from hoisted_bundle import build_hoisted
from safetensors import safe_open

from cspd.engines.backends import open_session
from cspd.engines.bundle import open_bundle
from cspd.engines.onnx_external import external_locations
from cspd.engines.schedule import make_schedule
from cspd.export.networks import EXACT, HOISTED, HOISTED_ROUND, MODULATION
from cspd.export.verify import compare
from cspd.runtime.contract import check_graphs

ADDED = {MODULATION, HOISTED, HOISTED_ROUND}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """In fp16, so that the two kinds of weights part."""
    return open_bundle(build_hoisted(tmp_path_factory.mktemp("half") / "bundle", "fp16"))


def test_all_of_them_have_an_engine(half, hoisted_bundle, tiny_bundle):
    for bundle in (half, hoisted_bundle):
        graphs = bundle.manifest.models["target"].graphs
        assert set(graphs) >= ADDED
        for name in ADDED:
            engine = graphs[name].engines["tensorrt-rtx"]
            assert bundle.file(engine.file).stat().st_size == engine.bytes > 0
        check_graphs(bundle.manifest)
    for model in tiny_bundle.manifest.models.values():
        assert not ADDED & set(model.graphs)


def test_only_the_step_is_in_half_precision(half):
    record = half.manifest.models["target"]
    for name in ADDED:
        weights = record.first_weights if name in EXACT else record.weights
        path = half.graph_file(f"target/{name}")
        assert external_locations(path.read_bytes()) == {weights.partition("/")[2]}
        # Half precision has 11 bits.
        assert (record.graphs[name].measured_error > 2.0**-16) == (name == HOISTED)
    with safe_open(half.file(record.first_weights), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}
    steps = {
        n: {t.name: t for t in record.graphs[n].spec.inputs}["step"] for n in ADDED - {MODULATION}
    }
    assert steps[HOISTED].spares_last and not steps[HOISTED_ROUND].spares_last


@pytest.mark.parametrize("name", sorted(ADDED))
def test_pytorch_runs_them_too(half, name):
    label, schedule = f"target/{name}", make_schedule(half.manifest.schedule, 10)
    sessions = (open_session(half, label, backend) for backend in ("onnxruntime", "torch"))
    for output, error in compare(*sessions, schedule).items():
        tolerances = {t.name: t.tolerance for t in half.graph(label).spec.outputs}
        assert error <= (tolerances[output] or 0), output
