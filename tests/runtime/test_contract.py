"""Specs of a manifest that do not fit the code or the geometry, for every output that is read."""

import json

import pytest

from cspd.engines.bundle import MANIFEST
from cspd.engines.errors import BundleError
from cspd.engines.manifest import Manifest
from cspd.runtime.commands.cli import shipped_bundle
from cspd.runtime.contract import check_graphs

OUTPUTS = [
    ("backbone", "z"), ("denoiser", "log_std"), ("denoiser_loop", "sum_log_std"),
    ("speculative_round", "next_x"), ("speculative_round", "moved"),
    ("speculative_loop", "next_fraction"), ("speculative_loop", "drawn"), ("decoder", "images"),
]  # fmt: skip
CHANGES = {
    "type": lambda t: t.update(dtype={"float32": "int32", "int32": "float32"}[t["dtype"]]),
    "rank": lambda t: t.update(shape=[*t["shape"], 1]),
    "first axis": lambda t: t.update(shape=["other", *t["shape"][1:]]),
    "name": lambda t: t.update(name="other"),
}


def graph_of(document: dict, name: str) -> dict:
    return document["decoder"] if name == "decoder" else (
        document["models"]["draft"]["graphs"][name]
    )  # fmt: skip


@pytest.fixture
def document() -> dict:
    return json.loads((shipped_bundle() / MANIFEST).read_bytes())


def test_the_shipped_pair_fits(document):
    check_graphs(Manifest.model_validate(document))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("graph", "output"), OUTPUTS)
def test_an_output_that_the_code_reads_has_its_type_and_shape(document, graph, output, change):
    spec = graph_of(document, graph)["spec"]
    spec["axes"]["other"] = {"min": 1, "opt": 1, "max": 1}
    spec["inputs"].append({"name": "more", "shape": ["other"]})
    spec["independent"] = None
    CHANGES[change](next(tensor for tensor in spec["outputs"] if tensor["name"] == output))
    with pytest.raises(BundleError, match=rf"{graph}: .*{output}.*cspd-export build"):
        check_graphs(Manifest.model_validate(document))


@pytest.mark.parametrize(("graph", "output"), [case for case in OUTPUTS if case[1] != "z"])
def test_the_channels_of_an_output_are_those_of_the_geometry(document, graph, output):
    """The width of `z` is the model's own; every other last size is given."""
    spec = graph_of(document, graph)["spec"]
    tensor = next(tensor for tensor in spec["outputs"] if tensor["name"] == output)
    tensor["shape"] = [*tensor["shape"][:-1], 3]
    spec["independent"] = None
    with pytest.raises(BundleError, match=f"{output} is .*the geometry of the bundle says"):
        check_graphs(Manifest.model_validate(document))


def test_models_of_another_family_are_refused(document):
    """A manifest that says nothing, as all did once, is MAR's."""
    assert "family" not in document
    assert Manifest.model_validate(document).family == "mar"
    document["family"] = "xar"
    with pytest.raises(BundleError, match="family is 'xar', this version runs mar; use"):
        check_graphs(Manifest.model_validate(document))
