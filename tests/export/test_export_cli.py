"""`cspd-export`: looking into bundles, and errors of a build in one line."""

import json
import re
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from click.testing import CliRunner
from narrow import check_narrow
from safetensors.torch import load_file

from cspd.engines.bundle import open_bundle
from cspd.engines.console.commands import human_bytes
from cspd.engines.trt.options import BuildOptions as EngineOptions
from cspd.export.build import KEY
from cspd.export.cli import main
from cspd.export.pairs import demo_plan
from cspd.runtime.settings import shipped_bundle


def cspd_export(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result, code: int, *fragments: str) -> None:
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ") and result.stdout == ""
    assert code == 2 or all(line.startswith("Error: ") for line in lines)
    for fragment in fragments:
        assert any(fragment in line for line in lines)


def test_inspect_shows_graphs_weights_and_identity(tiny_bundle):
    result = cspd_export("inspect", tiny_bundle.folder)
    assert result.exit_code == 0
    for label in tiny_bundle.manifest.graphs():
        assert label in result.stdout
    check_narrow("\n".join(result.stdout.splitlines()[:-1]), "model_ema")
    for fragment in (
        tiny_bundle.sha256[:16], "16 tokens of 16 channels", "1 x 16 x 16", "1000 classes",
        "clipped at 950", "target: tiny-target, fp32", "target/weights.safetensors",
    ):  # fmt: skip
        assert fragment in result.stdout
    assert "SYNTHETIC" not in result.stdout


def test_inspect_json_is_the_manifest(tiny_bundle):
    result = cspd_export("inspect", tiny_bundle.folder, "--json")
    assert json.loads(result.stdout) == tiny_bundle.manifest.model_dump(mode="json")


def test_inspect_says_that_weights_are_random(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle.folder, tmp_path / "b")
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    manifest["synthetic"] = True
    (tmp_path / "b/manifest.json").write_text(json.dumps(manifest))
    assert "SYNTHETIC" in cspd_export("inspect", tmp_path / "b").stdout


def test_inspect_checks_every_file(tiny_bundle, tmp_path):
    for name in tiny_bundle.manifest.files:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(tiny_bundle.folder, folder)
        with (folder / name).open("r+b") as file:
            file.write(b"?")
        refused(cspd_export("inspect", folder), 1, f"{name}: differs from the hash")
        assert cspd_export("inspect", folder, "--no-verify").exit_code == 0


def test_inspect_without_a_bundle(tmp_path):
    refused(cspd_export("inspect", tmp_path), 1, "no manifest.json there", "cspd-export build")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty working directory, so that no weights are found."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


BUILD = ("build", "--target", "mar-b", "--out", "out")
RANDOM = (*BUILD, "--random-weights")
RTX = ("--backend", "tensorrt-rtx")
BAD = {
    "no weights": ((), 1, ["mar-b: no weights at", "mar_base", "--random-weights", "kl16: no"]),
    "missing file": (("--target-weights", "gone.pth"), 1, ["gone.pth: cannot be read"]),
    "max-batch": (("--max-batch", "0"), 2, ["--max-batch", "1<=x"]),
    "max-rows": (("--max-rows", "-3"), 2, ["--max-rows", "1<=x"]),
    **{
        f"clip at {time}": (
            ("--clip-timesteps", time, "--random-weights", "--dry-run"), 2,
            ["--clip-timesteps", "99<=x<=999"],
        )
        for time in ("0", "98", "1000", "1" + "0" * 19)
    },
    "precision": (("--precision", "int4"), 2, ["--precision"]),
    "size": (("--target", "mar-xl"), 2, ["--target", "'mar-b', 'mar-l', 'mar-h'", "Did you mean"]),
    "draft": (("--draft", "mar-xl"), 2, ["--draft", "'mar-b'"]),
    "opt-level": ((*RTX, "--opt-level", "9"), 2, ["--opt-level", "9"]),
    "another TensorRT's": ((*RTX, "--timing-cache", "t"), 2, ["--timing-cache", "tensorrt"]),
    "weights beside random ones": (
        ("--random-weights", "--target-weights", "w.pth", "--allow-non-ema"), 2,
        ["--target-weights, --allow-non-ema: not used with --random-weights"],
    ),
    "weights of no draft": (("--draft-weights", "w.pth"), 2, ["--draft-weights", "add --draft"]),
    **{
        option: ((option, *value), 2, [option, "add --backend"])
        for option, *value in (
            ("--compute-capability", "8.9"), ("--workspace", "64"), ("--opt-level", "3"),
            ("--timing-cache", "t"), ("--version-compatible",), ("--hardware-compatible",),
            ("--no-hoisted",),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_build(nowhere, case):
    options, code, fragments = BAD[case]
    refused(cspd_export(*BUILD, *options), code, *fragments)
    assert list(nowhere.iterdir()) == []


def test_checkpoint_that_is_a_web_page(nowhere):
    (nowhere / "w.pth").write_text("<!doctype html><title>Sign in</title>")
    result = cspd_export(*BUILD, "--target-weights", "w.pth", "--vae", "w.pth")
    refused(result, 1, "w.pth: a web page saved under the name of a checkpoint")
    assert [path.name for path in nowhere.iterdir()] == ["w.pth"]


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra_names_the_pip_command(nowhere, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    extra = "cpu" if library == "onnxruntime" else "export"
    refused(cspd_export(*BUILD), 1, f"{library} is not installed", f"pip install 'cspd[{extra}]'")
    assert list(nowhere.iterdir()) == []


def test_demo_pair_without_weights(nowhere):
    refused(cspd_export("demo-pair", ".", "--out", "out"), 1, "target.safetensors: not found")
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "2 kB"), (2_500_000, "2 MB"), (3.2e9, "3.20 GB")],
)
def test_human_bytes(size, text):
    assert human_bytes(size) == text


def test_a_dry_run_shows_the_plan_and_makes_nothing(nowhere):
    pair = (*RANDOM, "--draft", "mar-b", "--dry-run")
    shown = cspd_export(*pair)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    for label in ("target/speculative_loop", "draft/backbone", "decoder"):
        assert any(line.split()[:1] == [label] for line in lines)
    assert lines[-1] == "nothing is missing; next: the same command without --dry-run"
    assert lines[-2].startswith("estimated: ") and max(map(len, lines)) <= 80
    plan = json.loads(cspd_export(*pair, "--json").stdout)
    assert (plan["estimated"], plan["problems"], plan["made"]) == (True, [], [])
    # Weights in float32 of two models of 208 and a decoder of 38 million parameters.
    assert plan["disk_bytes"] == 4 * (2 * 207_924_768 + 38_189_203)
    assert list(nowhere.iterdir()) == []


def test_a_dry_run_names_everything_that_is_missing(nowhere):
    (nowhere / "thesis").write_text("mine")
    result = cspd_export("build", "--target", "mar-b", "--out", "thesis/out", "--dry-run", "--json")
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["problems"]
    assert result.stderr.splitlines() == [f"Error: {problem}" for problem in problems]
    for problem, words in zip(
        problems, ["thesis/out: cannot write there", "mar-b: no weights", "kl16: no weights"],
        strict=True,
    ):  # fmt: skip
        assert problem.startswith(words)


@pytest.mark.parametrize("verb", [RANDOM, ("demo-pair", "--out", "out")])
def test_engines_that_cannot_be_built_are_refused_before_the_first_graph(nowhere, verb):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    result = cspd_export(*verb, *RTX, "--compute-capability", "9.0")
    refused(result, 1, "--compute-capability: got ['9.0']")
    assert list(nowhere.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tensorrt_without_its_library_or_a_gpu_is_refused_before_the_first_graph(nowhere):
    result = cspd_export(*RANDOM, "--backend", "tensorrt")
    needs = "torch sees none" if find_spec("tensorrt") else "pip install 'cspd[gpu]'"
    refused(result, 1, needs)
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_build_ends_with_what_it_made_and_what_to_do_next(nowhere, flags):
    """The shipped pair, as a build that was killed just before it was published leaves it."""
    shutil.copytree(shipped_bundle(), nowhere / ".out.building")
    (nowhere / ".out.building" / KEY).write_text(demo_plan().key())
    result = cspd_export("demo-pair", "--out", "out", *flags)
    assert result.exit_code == 0, result.output
    files = [path.relative_to(nowhere) for path in (nowhere / "out").rglob("*") if path.is_file()]
    if flags:
        record = json.loads(result.stdout)
        assert sorted(record["made"]) == sorted(map(str, files))
        assert record["bytes"] == sum(path.stat().st_size for path in files)
    else:
        assert result.stdout.splitlines() == [
            # All but the manifest are in the manifest.
            f"out: {len(files) - 1} files, 11 MB; engines: none", "next: cspd-run generate out",
        ]  # fmt: skip


def test_inspect_ends_with_its_findings(hoisted_bundle, tiny_bundle):
    for bundle, engines in ((tiny_bundle, "none"), (hoisted_bundle, "tensorrt-rtx for 8 graphs")):
        result = cspd_export("inspect", bundle.folder)
        lines = result.stdout.splitlines()
        assert lines[-1] == f"next: cspd-run generate {bundle.folder}"
        assert re.fullmatch(
            rf"{len(bundle.manifest.files)} files, [\d.]+ MB, all hashes match, all weights are "
            rf"finite; engines: {engines}",
            lines[-2],
        )
        assert "files not checked" in cspd_export("inspect", bundle.folder, "--no-verify").stdout


def test_lint_ends_with_a_verdict(tiny_bundle):
    graph = tiny_bundle.folder / "target/backbone.onnx"
    result = cspd_export("lint", graph)
    assert re.fullmatch(r"PASS: 0 errors, \d+ warnings; next: .*", result.stdout.splitlines()[-1])
    record = json.loads(cspd_export("lint", graph, "--json").stdout)
    assert record["made"] == [] and isinstance(record["findings"], list)


def test_the_demo_pair_is_rebuilt_from_its_own_weights():
    shipped = open_bundle(shipped_bundle())
    plan = demo_plan(precision="fp16", engines=(EngineOptions(),))
    assert plan.options.precision == "fp16" and plan.options.engines
    for role, source in plan.models.items():
        assert source.sha256 == shipped.manifest.models[role].source_sha256
        stored = load_file(shipped.file(f"{role}/weights.safetensors"))
        assert all(torch.equal(stored[name], tensor) for name, tensor in source.weights().items())
        assert stored.keys() == source.weights().keys()
