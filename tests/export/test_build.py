"""Building a bundle: resumed, interrupted, refused; what was there before is never lost."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorded import TINY, tiny_state
from safetensors.torch import load_file, save_file
from tiny_pair import CLIPPED, tiny_plan

from cspd.engines.bundle import open_bundle
from cspd.engines.errors import CspdError
from cspd.engines.schedule import ScheduleSpec, make_schedule
from cspd.engines.sessions.ort import ort_session
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.export import build_graph
from cspd.export.build import BuildOptions, Source, build_bundle, check_pair
from cspd.export.graphs.networks import model_graphs
from cspd.export.mar.assemble import assemble_mar
from cspd.export.verify import compare, relative_error, verify_graph


@pytest.fixture
def half_built(built_tiny, tmp_path) -> Path:
    """Place of a bundle whose build was interrupted before its last graph, the decoder."""
    shutil.copytree(built_tiny[1], tmp_path / ".out.building")
    return tmp_path / "out"


def staging_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.building")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def made_and_found(messages: list[str]) -> tuple[list[str], list[str]]:
    """Labels of the graphs that were exported, and of those that were found finished."""
    made = [line.partition(":")[0] for line in messages if "exported" in line]
    found = [line.partition(":")[0] for line in messages if "earlier" in line]
    assert len(made) + len(found) == len(messages)
    return made, found


def test_finished_bundle(tiny_bundle):
    manifest = tiny_bundle.manifest
    files = {str(p.relative_to(tiny_bundle.folder)) for p in tiny_bundle.folder.rglob("*.*")}
    assert files == {*manifest.files, "manifest.json"}
    for name in manifest.files:
        assert tiny_bundle.file(name).is_file()
    assert set(manifest.models) == {"target", "draft"} and not manifest.synthetic
    for record in manifest.graphs().values():
        # Measured with the rounding of float32: well below the tolerance, and no number is made up.
        assert 0 <= record.measured_error < 1e-5
    assert manifest.models["target"].source_sha256 == tiny_plan().models["target"].sha256
    assert (
        manifest.libraries["torch"] == torch.__version__.partition("+")[0]
        or "+" in (manifest.libraries["torch"])
    )


def test_resumed_build_makes_only_what_is_missing(half_built, tiny_bundle):
    (staging_of(half_built) / "draft" / "denoiser.done.json").unlink()
    messages: list[str] = []
    build_bundle(tiny_plan(), half_built, report=messages.append)
    made, found = made_and_found(messages)
    assert made == ["draft/denoiser", "decoder/decoder"]
    graphs = {r.file.removesuffix(".onnx") for r in tiny_bundle.manifest.graphs().values()}
    assert set(found) == graphs - set(made)
    assert not staging_of(half_built).exists()
    finished = open_bundle(half_built)
    assert finished.manifest == tiny_bundle.manifest
    assert digest(half_built) == digest(tiny_bundle.folder)


def test_damaged_graph_of_an_interrupted_build_is_made_again(half_built):
    path = staging_of(half_built) / "draft" / "denoiser.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    messages: list[str] = []
    build_bundle(tiny_plan(), half_built, report=messages.append)
    assert made_and_found(messages)[0] == ["draft/denoiser", "decoder/decoder"]


def test_interrupted_build_keeps_the_old_bundle(half_built, tiny_bundle, monkeypatch):
    shutil.copytree(tiny_bundle.folder, half_built)
    manifest = half_built / "manifest.json"
    manifest.write_text(manifest.read_text().replace("tiny-target", "older-target"))
    before = digest(half_built)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_graph, "verify_graph", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_bundle(tiny_plan(), half_built, overwrite=True)
    assert digest(half_built) == before
    assert open_bundle(half_built).manifest.models["target"].preset == "older-target"
    messages: list[str] = []
    build_bundle(tiny_plan(), half_built, overwrite=True, report=messages.append)
    assert made_and_found(messages)[0] == ["decoder/decoder"]
    assert digest(half_built) == digest(tiny_bundle.folder)


def test_graph_that_differs_from_pytorch_is_refused(half_built, monkeypatch):
    """One wrong number among the weights that the ONNX file reads."""
    (staging_of(half_built) / "draft" / "denoiser.done.json").unlink()
    weights = staging_of(half_built) / "draft" / "weights.safetensors"
    original = build_graph.save_graph

    def save_and_damage(*arguments):
        original(*arguments)
        state = load_file(weights)
        state["diffloss.net.final_layer.linear.bias"][3] += 1
        save_file(state, weights)

    monkeypatch.setattr(build_graph, "save_graph", save_and_damage)
    with pytest.raises(CspdError, match=r"denoiser: mean differs .* the bundle was not published"):
        build_bundle(tiny_plan(), half_built)
    assert not half_built.exists()
    assert not (staging_of(half_built) / "draft" / "denoiser.done.json").exists()


def test_verification_against_other_weights(tiny_bundle):
    schedule = make_schedule(CLIPPED, 10)
    path = tiny_bundle.graph_file("target/denoiser")
    right = model_graphs(assemble_mar(TINY, tiny_state(), "fp32"), 16, 512)["denoiser"]
    error = verify_graph(path, right[1], right[0], right[0], schedule)
    assert 0 < error < right[1].outputs[0].tolerance
    state = tiny_state()
    state["diffloss.net.input_proj.weight"] *= 1.01
    wrong = model_graphs(assemble_mar(TINY, state, "fp32"), 16, 512)["denoiser"]
    with pytest.raises(CspdError, match="differs from PyTorch by"):
        verify_graph(path, wrong[1], wrong[0], wrong[0], schedule)


class Answer:
    """A session that doubles its input, and returns `value` at one number of rows."""

    def __init__(self, value: float, rows: int) -> None:
        axes = {"rows": Axis(min=1, opt=2, max=8)}
        tensors = (
            (TensorSpec(name=name, shape=("rows", 2), tolerance=1e-4),) for name in ("x", "y")
        )
        inputs, outputs = tensors
        self.spec = GraphSpec(name="answer", inputs=inputs, outputs=outputs, axes=axes)
        self.value, self.rows = value, rows

    def __call__(self, x):
        y = 2 * x
        if len(x) == self.rows:
            y[0, 0] = self.value
        return {"y": y}


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_output_is_no_agreement(value, rows):
    """At any of the compared sizes; NaN is neither smaller nor larger than a tolerance."""
    schedule = make_schedule(CLIPPED, 10)
    good = compare(Answer(0.0, 99), Answer(0.0, 99), schedule)
    assert good == {"y": 0.0}
    worst = compare(Answer(value, rows), Answer(0.0, 99), schedule)["y"]
    assert not worst <= 1e-4


def test_relative_error():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) > 1e20


def with_draft(**changes):
    plan = tiny_plan()
    draft = plan.models["draft"]
    other = replace(draft, config=replace(draft.config, **changes))
    return replace(plan, models={**plan.models, "draft": other})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("grid", 5, "4"), ("token_dim", 32, "16"), ("num_classes", 10, "1000")],
)
def test_draft_of_another_geometry(tmp_path, field, value, expected):
    with pytest.raises(CspdError) as caught:
        build_bundle(with_draft(**{field: value}), tmp_path / "out")
    message = str(caught.value)
    assert f"draft tiny-draft: {field} is {value}" in message
    assert f"the target tiny-target has {expected}" in message
    assert list(tmp_path.iterdir()) == []


def test_draft_of_another_size_is_fine():
    assert check_pair(with_draft(encoder_depth=1, embed_dim=16, head_width=8)) is None


def test_a_bundle_is_replaced_only_if_asked(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle.folder, tmp_path / "out")
    messages: list[str] = []
    with pytest.raises(CspdError, match="holds a bundle already; add --overwrite"):
        build_bundle(tiny_plan(), tmp_path / "out", report=messages.append)
    assert messages == [] and digest(tmp_path / "out") == digest(tiny_bundle.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CspdError, match="exists and is not a bundle"):
        build_bundle(tiny_plan(), tmp_path / "out", overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CspdError, match="cannot write there"):
        build_bundle(tiny_plan(), tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def other_schedule(plan):
    return replace(plan, schedule=ScheduleSpec())


def other_options(plan):
    return replace(plan, options=BuildOptions(max_batch=8))


def other_weights(plan):
    source = plan.models["draft"]
    changed = Source(source.preset, source.state, source.origin, "f" * 64, source.config)
    return replace(plan, models={**plan.models, "draft": changed})


@pytest.mark.parametrize("change", [other_schedule, other_options, other_weights])
def test_an_interrupted_build_of_something_else_is_not_continued(half_built, monkeypatch, change):
    assert list(staging_of(half_built).rglob("*.done.json"))

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_graph, "export_graph", interrupt)
    plan = change(tiny_plan())
    assert plan.key() != tiny_plan().key()
    with pytest.raises(KeyboardInterrupt):
        build_bundle(plan, half_built)
    assert list(staging_of(half_built).rglob("*.done.json")) == []


@pytest.mark.parametrize("values", [{"max_batch": 0}, {"max_rows": 0}, {"max_batch": 5000}])
def test_impossible_ranges(values):
    ((name, value),) = values.items()
    option = "--" + name.replace("_", "-")
    with pytest.raises(CspdError, match=rf"{option} is {value}, expected 1\.\."):
        BuildOptions(**values)


def test_random_weights_are_marked(tmp_path):
    plan = tiny_plan()
    draft = replace(plan.models["draft"], origin="random")
    assert replace(plan, models={**plan.models, "draft": draft}).synthetic
    assert not plan.synthetic


def test_exported_graph_runs_from_another_place(tiny_bundle, tmp_path):
    """A bundle is moved or copied as a whole: weights are found beside the graph."""
    shutil.copytree(tiny_bundle.folder, tmp_path / "moved")
    moved = open_bundle(tmp_path / "moved")
    spec = moved.graph("target/denoiser").spec
    sizes = {"rows": 2, "branches": 2, "tokens": 2, "steps": 10}
    inputs = spec.example_inputs(sizes)
    inputs["schedule"] = make_schedule(CLIPPED, 10).table
    results = [
        ort_session(str(bundle.graph_file("target/denoiser")), spec, threads=1)(**inputs)
        for bundle in (tiny_bundle, moved)
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert json.loads((tmp_path / "moved/manifest.json").read_text())["schema_version"] == 1
