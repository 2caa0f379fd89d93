"""Options of the measuring verbs that would do nothing are refused; how these verbs end."""

import json

import pytest
from click.testing import CliRunner

from cspd.export.cli import main as export_main
from cspd.runtime.commands.cli import main as run_main
from cspd.runtime.settings import shipped_bundle
from cspd.tools.bench.plan import Scale, make_plan, titles
from cspd.tools.parity.command import ending
from cspd.tools.parity.ladder import EVERY_RUNG
from cspd.tools.parity.measure import Row, Skipped

SHIPPED = str(shipped_bundle())
IDLE = {
    ("bench", "--readme"): "--readme: name the folder of finished results with --out",
    ("bench", "--readme", "--out", "x", "--seed", "3"): "--seed: not used with --readme",
    ("bench", "--quick", "--no-compile"): "--no-compile: --quick leaves torch.compile out",
    ("bench", "--quick", "--inception", "w"): "--inception: nothing is scored here",
    ("parity", "--polygraphy", "--seeds", "3", "--bisect"): "--seeds, --bisect: not used with",
    ("parity", "--rung", "image", "--budget", "3"): "--budget: not used by these rungs; leave it",
    ("parity", "--rung", "graphs", "--backend", "onnxruntime"): "or add --rung backends",
    ("triton", SHIPPED, "--out", "x", "--backend", "tensorrt"): "--backend: tensorrt runs on GPUs",
}  # fmt: skip


@pytest.mark.parametrize("arguments", IDLE, ids=" ".join)
def test_an_option_that_does_nothing_is_refused(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    program = run_main if arguments[0] == "bench" else export_main
    result = CliRunner().invoke(program, list(arguments))
    assert result.exit_code == 2, result.output
    assert IDLE[arguments] in result.stderr and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_triton_with_engines_that_are_not_there(tmp_path):
    arguments = ["triton", SHIPPED, "--out", str(tmp_path / "x"), "--backend", "tensorrt"]
    result = CliRunner().invoke(export_main, [*arguments, "--device", "cuda"])
    assert result.exit_code == 1 and "has no engines of tensorrt" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_points_have_names_that_can_be_read(tiny_bundle):
    points = make_plan(tiny_bundle.manifest, {"seed": 3}, Scale(batch_sizes=(1, 4, 8)))
    names = titles(points)
    assert len(set(names.values())) == len(points)
    assert names[points[0].id] == "target, batch 4"
    assert "cspd, gamma 8, batch 4" in names.values()
    assert "cspd, gamma 8, batch 4, torch" in names.values()


def test_a_dry_run_of_bench_ends_with_the_next_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(run_main, ["bench", "--quick", "--dry-run"])
    assert shown.stdout.splitlines()[-1] == "next: the same command without --dry-run"
    plan = json.loads(
        CliRunner().invoke(run_main, ["bench", "--quick", "--dry-run", "--json"]).stdout
    )
    assert plan["made"] == [] and f"{len(plan['points'])} settings, " in shown.stdout
    assert list(tmp_path.iterdir()) == []


def row(subject: str, error: float, gate: bool = True) -> Row:
    return Row("graphs", subject, "x", "case", error, 1e-4, gate=gate)


def test_the_ending_of_parity_counts_what_the_table_shows():
    rows = [row("a", 1e-6), row("a", 1e-5), row("b", 1e-5), row("c", 1.0, gate=False)]
    cuda = [Skipped(EVERY_RUNG, name, "no CUDA device") for name in ("x cuda", "y cuda")]
    assert ending(rows, []) == "PASS 2 of 2"
    assert ending(rows, cuda) == "PASS 2 of 2, 2 backends skipped: no CUDA device"
    assert (
        ending([*rows, row("a", 1e-3)], cuda[:1])
        == "FAIL 1 of 2, 1 backend skipped: no CUDA device"
    )
