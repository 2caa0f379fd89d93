import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from click.testing import CliRunner
from narrow import check_narrow

from cspd.engines.bundle import hash_file, open_bundle
from cspd.engines.errors import BundleError
from cspd.engines.spec import Axis, GraphSpec, TensorSpec
from cspd.tools.parity import command as parity
from cspd.tools.parity.bisect import suspect
from cspd.tools.parity.ladder import within
from cspd.tools.parity.measure import Row, finite, measure, worst
from cspd.tools.parity.rungs import RUNGS, decision_rows, output_rows, psnr
from cspd.tools.probe import canvas_before, unoptimised_session, verdicts

SMALL = {"images": 2, "num_iter": 4, "head_steps": 5, "seeds": 1}


def scaled_copy(folder: Path, out: Path, label: str, factor: float) -> str:
    """A copy of the bundle whose graph `label` has its largest weight times `factor`."""
    shutil.copytree(folder, out)
    path = out / f"{label}.onnx"
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda t: math.prod(t.dims))
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array((values * factor).astype(np.float32), weight.name))
    onnx.save(model, path)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"][f"{label}.onnx"] = hash_file(path).model_dump()
    (out / "manifest.json").write_text(json.dumps(manifest))
    return weight.name


def failed(rows: list[Row]) -> set[tuple[str, str]]:
    return {(row.rung, row.subject.split()[0]) for row in parity.failures(rows)}


@pytest.fixture(scope="module")
def sound(tiny_bundle):
    ladder = parity.make_ladder(tiny_bundle, **SMALL)
    return ladder, *parity.climb(ladder, RUNGS)


def test_every_rung_passes_on_a_sound_bundle(sound):
    ladder, rows, skipped = sound
    assert not parity.failures(rows)
    assert {row.rung for row in rows} == set(RUNGS)
    # All graphs were compared on random and on recorded inputs.
    for label in ladder.bundle.manifest.graphs():
        cases = {row.case.split()[0] for row in rows if row.subject == f"{label} as exported"}
        assert {"recorded"} <= cases, label
    assert {item.subject for item in skipped if item.rung == "all"} >= {"tensorrt cuda"}


def test_rungs_count_their_steps(sound):
    ladder, rows, _ = sound
    chain = [row for row in rows if row.rung == "trajectory" and row.case.startswith("chain 0")]
    assert len(chain) == ladder.config.head_steps * len(ladder.bundle.manifest.models)
    target = [row for row in rows if row.rung == "image" and row.subject.startswith("target")]
    assert len([row for row in target if row.output == "tokens"]) == ladder.config.num_iter
    assert len([row for row in target if row.output == "pixels"]) == ladder.config.num_images


@pytest.mark.parametrize(
    ("label", "rungs"),
    [
        ("target/backbone", {"graphs", "backends", "image", "decisions"}),
        ("target/denoiser", {"graphs", "backends", "trajectory"}),
        ("draft/denoiser_loop", {"graphs", "backends", "image", "decisions"}),
    ],
)
def test_a_weight_off_by_one_percent_fails_on_the_right_rungs(tiny_bundle, tmp_path, label, rungs):
    scaled_copy(tiny_bundle.folder, tmp_path / "bundle", label, 1.01)
    ladder = parity.make_ladder(
        open_bundle(tmp_path / "bundle"), backends=("onnxruntime",), **SMALL
    )
    rows, _ = parity.climb(ladder, RUNGS)
    role = label.split("/")[0]
    subjects = {"graphs": label, "backends": label, "decisions": "onnxruntime"}
    found = failed(rows)
    assert found <= {(rung, subjects.get(rung, role)) for rung in rungs}
    # One call must show it; whether a short chain amplifies it further depends on the weights.
    assert {("graphs", label), ("backends", label)} <= found


def test_the_command_fails_and_names_the_node(tiny_bundle, tmp_path):
    name = scaled_copy(tiny_bundle.folder, tmp_path / "bundle", "target/backbone", 1.01)
    options = ["--num-iter", "4", "--head-steps", "5", "--seeds", "1", "--rung", "graphs"]
    arguments = [str(tmp_path / "bundle"), *options, "--bisect", "--json"]
    result = CliRunner().invoke(parity.command, arguments)
    assert result.exit_code == 1
    record = json.loads(result.stdout)
    assert record["passed"] is False
    assert [item["graph"] for item in record["suspects"]] == ["target/backbone"]
    found = record["suspects"][0]["nodes"]
    model = onnx.load(tmp_path / "bundle" / "target/backbone.onnx")
    user = next(node for node in model.graph.node if name in node.input)
    assert found[0]["output"] in user.output
    assert found[0]["error"] == pytest.approx(0.01, rel=0.2)


def test_the_command_succeeds_on_a_sound_bundle(tiny_bundle, tmp_path):
    out = tmp_path / "parity.json"
    arguments = [str(tiny_bundle.folder), "--num-iter", "2", "--head-steps", "5"]
    arguments += ["--rung", "decisions", "--rung", "image", "--out", str(out)]
    result = CliRunner().invoke(parity.command, arguments)
    assert result.exit_code == 0, result.output
    assert "decisions" in result.stdout and "…" not in result.stdout  # nothing is cut in a pipe
    check_narrow("\n".join(result.stdout.splitlines()[:-1]))  # the last line holds a path
    record = json.loads(out.read_text())
    assert record["passed"] and {row["rung"] for row in record["rows"]} == {"decisions", "image"}


@pytest.mark.parametrize("label", ["decoder", "draft/speculative_round", "draft/speculative_loop"])
def test_a_sound_graph_has_no_suspects(sound, label):
    assert suspect(sound[0], label).nodes == []


def test_measure_against_hand_values():
    stats = measure(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 2.0]))
    assert stats.max_abs == 2 and stats.mean_abs == pytest.approx(2 / 3)
    assert stats.norm == pytest.approx(2 / 3) and stats.max_rel == pytest.approx(1)
    assert stats.cosine == pytest.approx(13 / math.sqrt(21 * 9))


def test_not_a_number_never_passes():
    broken = torch.tensor([1.0, math.nan])
    stats = measure(broken, torch.ones(2))
    row = Row("graphs", "a", "x", "case", stats.norm, 1e9, stats)
    assert not row.passed
    assert not Row("graphs", "a", "x", "case", math.nan, 1e9).passed
    assert finite(row.to_json())["error"] is None
    json.dumps(row.to_json(), allow_nan=False)


def test_worst_is_the_failing_row():
    rows = [Row("graphs", "a", "x", str(e), e, 1.0) for e in (0.1, math.nan, 5.0, 0.2)]
    ((row, count),) = worst(rows)
    assert math.isnan(row.error) and count == 4


def test_psnr():
    reference = torch.zeros(8, 8, 1, dtype=torch.uint8)
    assert psnr(reference, reference) == 99
    assert psnr(reference + 255, reference) == pytest.approx(0)
    assert psnr(reference + 1, reference) == pytest.approx(20 * math.log10(255))


def test_sizes_shrink_to_the_budget():
    spec = GraphSpec(
        name="g",
        inputs=(TensorSpec(name="x", shape=("rows", 4)),),
        outputs=(TensorSpec(name="y", shape=("rows", 4)),),
        axes={"rows": Axis(min=1, opt=8, max=1024)},
    )
    assert within(spec, {"rows": 1024}, 2.0, 10) == {"rows": 128}
    assert within(spec, {"rows": 1024}, 1e-9, 10) == {"rows": 1}
    assert within(spec, {"rows": 100}, 2.0, 10) == {"rows": 100}


def test_floats_are_compared_where_decisions_agree():
    spec = GraphSpec(
        name="g",
        inputs=(TensorSpec(name="x", shape=("rows",)),),
        outputs=(
            TensorSpec(name="y", shape=("rows",), tolerance=1e-3),
            TensorSpec(name="count", dtype="int32", shape=("rows",)),
        ),
        axes={"rows": Axis(min=1, opt=8, max=8)},
    )
    got = {"y": torch.tensor([1.0, 9.0]), "count": torch.tensor([1, 2])}
    expected = {"y": torch.tensor([1.0, 2.0]), "count": torch.tensor([1, 3])}
    rows = list(output_rows("graphs", "g", spec, "case", got, expected))
    assert [(row.output, row.error) for row in rows] == [("decisions", 0.5), ("y", 0.0)]
    assert not rows[0].passed and rows[1].passed


def test_flips_and_their_margin():
    uniform = torch.tensor([[-1.0, -1.0, -1.0, -2.0]])
    expected = torch.tensor([[-0.5, -1.1, -40.0, 3.0]])
    got = torch.tensor([[-0.6, -0.9, -50.0, 5.0]])
    mask = torch.tensor([[True, True, True, True]])
    rows = list(decision_rows("b", [(got, uniform)], [(expected, uniform)], [mask]))
    assert rows[0].error == 0.25 and not rows[0].passed
    assert "1 of 4" in rows[0].note and "1.0e-01 nats" in rows[0].note
    # Only the two ratios within the range that decides anything count.
    assert rows[1].stats.max_abs == pytest.approx(0.2)


def test_rounds_account_for_every_token(sound):
    ladder = sound[0]
    config = ladder.config.model_copy(update={"method": "cspd"})
    pipeline = ladder.reference_pipeline()
    length = ladder.bundle.manifest.geometry.num_tokens
    judged = torch.zeros(config.num_images, dtype=torch.int64)
    accepted = 0
    before = torch.zeros(config.num_images, length, pipeline.bundle.manifest.geometry.token_dim)
    for done, verdict in verdicts(pipeline, config):
        judged += verdict.kept.sum(1)
        accepted += int(verdict.accepted.sum())
        assert not bool((verdict.accepted & ~verdict.kept).any())
        # What stood on the canvas when the window was drafted; the prefill comes before the first.
        if before.any():
            assert torch.equal(canvas_before(done.canvas, verdict.window).tokens, before)
        before = done.canvas.tokens.clone()
    (_, statistics), *_ = pipeline.generate(config)
    assert judged.tolist() == [length - statistics.prefilled // config.num_images] * 2
    assert accepted == statistics.verdicts.accepted


def test_hoisted_graphs_are_compared_on_related_inputs(hoisted_bundle):
    """All on recorded inputs; on random ones, too, where those need not fit each other."""
    ladder = parity.make_ladder(hoisted_bundle, backends=("onnxruntime",), **SMALL)
    rows, _ = parity.climb(ladder, ["graphs"])
    assert not parity.failures(rows)
    for name in ("head_modulation", "denoiser_hoisted", "speculative_round_hoisted"):
        cases = {r.case.split()[0] for r in rows if r.subject == f"target/{name} as exported"}
        assert "recorded" in cases
        assert (len(cases) == 1) == (name == "speculative_round_hoisted")
    for inputs in ladder.recorded["target/speculative_round_hoisted"]:
        assert inputs["modulation"].shape[0] == len(inputs["origin"]) <= 4


def test_a_graph_that_cannot_be_loaded_is_one_line(tiny_bundle, tmp_path):
    path = tmp_path / "g.onnx"
    path.write_bytes(b"")
    bundle = SimpleNamespace(graph_file=lambda _: path)
    with pytest.raises(BundleError, match=r"cannot be loaded .*; rebuild it with cspd-export"):
        unoptimised_session(bundle, "decoder")
