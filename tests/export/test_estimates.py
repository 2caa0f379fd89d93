"""What a build is said to take, against the build that was measured."""

import re
from pathlib import Path

import pytest
import torch

from cspd.engines.console.preflight import problems
from cspd.engines.trt.options import BuildOptions as EngineOptions
from cspd.export.build import BuildOptions
from cspd.export.estimates import (
    GB,
    MEASURED,
    WHOLE_BUILD,
    Estimate,
    GraphCost,
    estimate,
    parameters,
)
from cspd.export.graphs.networks import model_graphs
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import PRESETS
from cspd.export.preflight import size_checks
from cspd.runtime.settings import shipped_bundle

PAIR = {"target": "mar-h", "draft": "mar-b"}
FP16_ENGINES = BuildOptions(precision="fp16", engines=(EngineOptions(),))
UNITS = {"GB": 1e9, "MB": 1e6}


def documented() -> dict[str, list[float]]:
    """Rows of the table of engines: seconds, bytes of memory, seconds, bytes, memory."""
    text = (Path(__file__).parents[2] / "docs" / "evidence" / "engines.md").read_text()
    rows = re.findall(r"^\| (\S+)(?: \(fp32\))? \| (\d+) \| \S+ \| (\S+ GB) \| (\d+) \| (.*?) \|"
                      r" (\S+ GB) \|$", text, re.M)  # fmt: skip
    return {name: [_number(cell) for cell in cells] for name, *cells in rows}


def _number(cell: str) -> float:
    value, _, unit = cell.partition(" ")
    return float(value) * UNITS.get(unit, 1)


def test_the_basis_is_the_documented_build():
    rows = documented()
    found = estimate(PAIR, FP16_ENGINES)
    assert set(rows) == {*found.graphs, "all"}
    for label, cost in found.graphs.items():
        assert list(vars(cost).values()) == pytest.approx(rows[label], rel=1e-6), label
    seconds, memory, engine_seconds, engine_bytes, _ = rows["all"]
    # The rows are rounded, and so are their sums.
    assert found.seconds == pytest.approx(WHOLE_BUILD * (seconds + engine_seconds), rel=0.01)
    assert found.memory_bytes == memory
    assert found.disk_bytes - found.weight_bytes == pytest.approx(engine_bytes, rel=0.01)


def test_sizes_between_the_measured_ones_lie_on_their_line():
    """Engines hold weights and little else, so the line must meet the count of parameters."""
    found = estimate({"target": "mar-l"}, FP16_ENGINES)
    for name, which, each in (("backbone", 0, 2), ("denoiser", 1, 2), ("denoiser_first", 1, 4)):
        size = each * parameters("mar-l")[which]
        assert found.graphs[f"target/{name}"].engine_bytes == pytest.approx(size, rel=0.04)
    for name in MEASURED["mar-h"]:
        low, high = (MEASURED[preset][name].export_seconds for preset in ("mar-b", "mar-h"))
        assert low < found.graphs[f"target/{name}"].export_seconds < high


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("engines", [(), FP16_ENGINES.engines])
def test_the_graphs_are_those_that_are_built(precision, engines):
    options = BuildOptions(precision=precision, engines=engines)
    found = estimate({"target": "mar-b"}, options)
    with torch.device("meta"):
        model = Mar(PRESETS["mar-b"])
    graphs = model_graphs(model, 1, 1, precision, model.diffloss, hoisted=bool(engines))
    assert set(found.graphs) == {*(f"target/{name}" for name in graphs), "decoder"}
    for name, (_, spec) in graphs.items():
        assert bool(found.graphs[f"target/{name}"].engine_bytes) == spec.engines
    if not engines:
        assert found.disk_bytes == found.weight_bytes


def test_parameters_are_those_of_the_weight_files():
    for role in ("target", "draft"):
        size = (shipped_bundle() / role / "weights.safetensors").stat().st_size
        # Stored as fp16, after a header of a few kilobytes.
        assert 0 < size - 2 * sum(parameters(f"fashion-{role}")) < 20_000


def test_what_does_not_fit_is_refused(tmp_path):
    out, large = tmp_path / "new" / "out", 1e9 * GB
    small, huge = (
        Estimate({"g": GraphCost(1, size, 0, 0, 0)}, round(size), ()) for size in (1, large)
    )
    assert problems(size_checks(small, out)) == []
    disk, memory = problems(size_checks(huge, out))
    assert disk.startswith(f"{out}: the bundle takes about 1000000000.00 GB, ")
    assert "are free there" in disk and memory.startswith("memory: the build takes about ")
    assert list(tmp_path.iterdir()) == []
