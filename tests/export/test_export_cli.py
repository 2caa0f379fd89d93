"""`cspd-export`: looking into bundles, and errors of a build in one line."""

import json
import shutil
import sys

import pytest
from click.testing import CliRunner

from cspd.export.cli import human_bytes, main


def cspd_export(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result, code: int, *fragments: str) -> None:
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ") and result.stdout == ""
    assert code == 2 or len(lines) == 1
    for fragment in fragments:
        assert fragment in lines[-1]


def test_inspect_shows_graphs_weights_and_identity(tiny_bundle):
    result = cspd_export("inspect", tiny_bundle.folder)
    assert result.exit_code == 0
    for label in tiny_bundle.manifest.graphs():
        assert label in result.stdout
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
BAD = {
    "no weights": ((), 1, ["mar-b: no weights at", "mar_base", "--random-weights"]),
    "missing file": (("--target-weights", "gone.pth"), 1, ["gone.pth: cannot be read"]),
    "max-batch": (("--max-batch", "0"), 1, ["--max-batch is 0, expected 1.."]),
    "max-rows": (("--max-rows", "-3"), 1, ["--max-rows is -3, expected 1.."]),
    "clip": (("--clip-timesteps", "0"), 2, ["--clip-timesteps"]),
    "precision": (("--precision", "int4"), 2, ["--precision"]),
    "draft": (("--draft", "mar-xl"), 2, ["--draft", "'mar-b'"]),
    "opt-level": (("--backend", "tensorrt-rtx", "--opt-level", "9"), 1, ["--opt-level", "9"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_build(nowhere, case):
    options, code, fragments = BAD[case]
    refused(cspd_export(*BUILD, *options), code, *fragments)
    assert list(nowhere.iterdir()) == []


def test_checkpoint_that_is_a_web_page(nowhere):
    (nowhere / "w.pth").write_text("<!doctype html><title>Sign in</title>")
    result = cspd_export(*BUILD, "--target-weights", "w.pth")
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
