"""The command line: every bad input is one line, the right exit code, and nothing written."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from narrow import check_narrow

from cspd.engines.errors import CspdError
from cspd.runtime.commands.cli import main
from cspd.runtime.config import make_config, parse_labels

FAST = ("--num-images", "1", "--num-iter", "2", "--head-steps", "2", "--batch-size", "1")


def generate(bundle, out, *options: str):
    arguments = ["generate", str(bundle), "--out", str(out), "--threads", "1", *options]
    return CliRunner().invoke(main, arguments)


def refused(result, code: int, *fragments: str) -> None:
    """The command ended with `code` and one line on stderr, or click's usage and one line."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ") and result.stdout == ""
    assert code == 2 or len(lines) == 1
    for fragment in fragments:
        assert fragment in lines[-1]


BAD = {
    "unknown class": (("--labels", "goldfsh"), 2, ["no class 'goldfsh'", "nearest is 'goldfish'"]),
    "class too high": (("--labels", "1000"), 2, ["--labels: class 1000, expected 0..999"]),
    "negative class": (("--labels", "-1"), 2, ["--labels: class -1, expected 0..999"]),
    "no number": (("--labels", "--5"), 2, ["--labels"]),
    "endless number": (("--labels", "9" * 5000), 2, ["--labels"]),
    "empty label": (("--labels", "3,,4"), 2, ["--labels: no class ''; expected numbers"]),
    "no label": (("--labels", ""), 2, ["--labels: no class ''; expected numbers"]),
    "label and nothing": (("--labels", "3,"), 2, ["--labels: no class ''; expected numbers"]),
    "slice": (("--labels", "0:3"), 2, ["no class '0:3'; expected numbers, ranges like 0-3"]),
    "falling range": (("--labels", "3-1"), 2, ["3-1 is no range", "within 0-999"]),
    "range too far": (("--labels", "0-999999999"), 2, ["no range of classes", "within 0-999"]),
    "gamma 0": (("--gamma", "0"), 2, ["--gamma is 0", "expected 1 or more"]),
    "gamma too high": (("--gamma", "17"), 2, ["--gamma is 17, expected 1..16"]),
    "num-iter 0": (("--num-iter", "0"), 2, ["--num-iter is 0", "expected 1 or more"]),
    "num-iter too high": (("--num-iter", "17"), 2, ["--num-iter is 17, expected 1..16"]),
    "no images": (("--num-images", "0"), 2, ["--num-images is 0"]),
    "too many images": (("--num-images", str(2**32 + 1)), 2, ["--num-images"]),
    "negative seed": (("--seed", "-1"), 2, ["--seed is -1"]),
    "head steps": (("--head-steps", "1"), 2, ["--head-steps is 1"]),
    "head steps too high": (("--head-steps", "952"), 2, ["--head-steps is 952, expected 2..951"]),
    "prefill": (("--prefill", "1.5"), 2, ["--prefill is 1.5"]),
    "cfg nan": (("--cfg", "nan"), 2, ["--cfg is nan"]),
    "temperature": (("--temperature", "0"), 2, ["--temperature is 0"]),
    "accept": (("--accept-temperature", "-1"), 2, ["--accept-temperature is -1"]),
    "residual": (
        ("--on-reject", "residual", "--residual-temperature", "0"),
        2,
        ["--residual-temperature is 0"],
    ),
    "residual of nothing": (
        ("--residual-temperature", "1"),
        2,
        ["--residual-temperature 1 changes nothing", "add --on-reject residual"],
    ),
    "schedule of no guidance": (
        ("--cfg", "1", "--cfg-schedule", "constant"),
        2,
        ["--cfg-schedule constant changes nothing with --cfg 1: leave it out, or add --cfg 3"],
    ),
    "relaxed stepping": (
        ("--method", "target", "--relax", "tv=0.1"),
        2,
        ["--relax tv=0.1 changes nothing with --method target", "add --head lossless"],
    ),
    "wrong relaxation": (("--relax", "much", "--method", "lossless"), 2, ["expected tv=0..1"]),
    "shards of loose images": (
        ("--shard-size", "9"),
        2,
        ["--shard-size: changes nothing with --format png", "add --format webdataset"],
    ),
    "shards of one file": (
        ("--shard-size", "9", "--format", "npz"),
        2,
        ["--shard-size: changes nothing with --format npz"],
    ),
    "workers of nobody": (("--workers", "2"), 2, ["--workers: changes nothing", "add --ray"]),
    "baseline of itself": (
        ("--method", "target", "--baseline"),
        2,
        ["--baseline: changes nothing with --method target"],
    ),
    "nearly a method": (("--method", "losless"), 2, ["Did you mean 'lossless'?"]),
    "gamma of the target": (
        ("--method", "target", "--gamma", "4"),
        2,
        ["--gamma 4 changes nothing with --method target", "add --method cspd"],
    ),
    "noise of the draft": (
        ("--method", "draft", "--no-align"),
        2,
        ["--no-align changes nothing with --method draft"],
    ),
    "window of plain heads": (
        ("--window", "4"),
        2,
        ["--window 4 changes nothing", "add --head lossless"],
    ),
    "released target": (
        ("--as-released", "--method", "target"),
        2,
        ["--as-released means --method cspd, asked for was --method target"],
    ),
    "released otherwise": (
        ("--as-released", "--accept-temperature", "1"),
        2,
        ["--as-released means --accept-temperature 42, asked for was --accept-temperature 1"],
    ),
    "unbalanced": (
        ("--class-balanced", "--labels", "1,2", "--num-images", "3"),
        2,
        ["--class-balanced: --num-images is 3, expected a multiple of the 2 classes"],
    ),
    "format": (("--format", "gif"), 2, ["--format", "'webdataset'"]),
    "shard size": (("--shard-size", "0"), 2, ["--shard-size"]),
    "batch": (("--batch-size", "0"), 2, ["--batch-size is 0"]),
    "gamma text": (("--gamma", "many"), 2, ["--gamma", "not a valid integer"]),
    "method": (("--method", "magic"), 2, ["--method", "'target'"]),
    "backend": (("--backend", "abacus"), 2, ["--backend", "'onnxruntime'"]),
    "option": (("--gama", "4"), 2, ["--gama", "--gamma"]),
    "threads": (("--threads", "-1"), 2, ["--threads"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_option(tiny_bundle, tmp_path, case):
    options, code, fragments = BAD[case]
    refused(generate(tiny_bundle.folder, tmp_path / "out", *options), code, *fragments)
    assert list(tmp_path.iterdir()) == []


def test_missing_bundle(tmp_path):
    result = generate(tmp_path / "nowhere", tmp_path / "out")
    refused(result, 1, "no manifest.json there", "cspd-export build")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["target/weights.safetensors", "draft/backbone.onnx", "decoder/decoder.onnx", "manifest.json"],
)
def test_damaged_bundle(tiny_bundle, tmp_path, name):
    damaged = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.folder, damaged)
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 0x80
    (damaged / name).write_bytes(content)
    result = generate(damaged, tmp_path / "out", *FAST)
    # A manifest with one wrong byte is no JSON, or its hashes or names do not fit the files.
    refused(result, 1, "bundle" if name == "manifest.json" else f"{name}: differs from the hash")
    assert not (tmp_path / "out").exists()


def test_bundle_without_a_draft(tiny_bundle, tmp_path):
    alone = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.folder, alone)
    manifest = json.loads((alone / "manifest.json").read_text())
    del manifest["models"]["draft"]
    (alone / "manifest.json").write_text(json.dumps(manifest))
    for method in ("cspd", "draft"):
        result = generate(alone, tmp_path / "out", *FAST, "--method", method)
        refused(result, 2, f"--method {method}: the bundle has no draft model", "--draft")
    assert not (tmp_path / "out").exists()
    # The method defaults to what the bundle can do.
    result = generate(alone, tmp_path / "out", *FAST, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["config"]["method"] == "target"


def test_out_is_a_file(tiny_bundle, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(generate(tiny_bundle.folder, tmp_path / "out", *FAST), 1, "is not a folder")
    refused(generate(tiny_bundle.folder, tmp_path / "out/more", *FAST), 1, "is not a folder")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_folder_that_is_not_empty(tiny_bundle, tmp_path, options):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    result = generate(tiny_bundle.folder, out, *FAST, *options)
    refused(result, 1, str(out), "choose another --out")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_an_earlier_run(tiny_bundle, tmp_path):
    out = tmp_path / "out"
    assert generate(tiny_bundle.folder, out, *FAST, "--num-images", "3").exit_code == 0
    refused(generate(tiny_bundle.folder, out, *FAST), 1, "is not empty", "--overwrite")
    assert len(list(out.glob("0*.png"))) == 3
    assert generate(tiny_bundle.folder, out, *FAST, "--overwrite").exit_code == 0
    assert [path.name for path in out.glob("0*.png")] == ["00000.png"]
    assert len((out / "images.jsonl").read_text().splitlines()) == 1


def test_missing_extra_names_the_pip_command(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = generate(tiny_bundle.folder, tmp_path / "out", *FAST)
    refused(result, 1, "onnxruntime is not installed", "pip install 'cspd[cpu]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(tiny_bundle, tmp_path, backend):
    options = (*FAST, "--device", "cuda", "--backend", backend)
    refused(generate(tiny_bundle.folder, tmp_path / "out", *options), 1, "CUDA")
    assert list(tmp_path.iterdir()) == []


def test_json_is_all_there_is_on_stdout(tiny_bundle, tmp_path):
    result = generate(tiny_bundle.folder, tmp_path / "out", *FAST, "--json")
    record = json.loads(result.stdout)
    assert record["schema"] == 2 and record["images"] == 1
    assert "1/1 images" in result.stderr


def test_quiet_says_nothing_on_stderr(tiny_bundle, tmp_path):
    result = generate(tiny_bundle.folder, tmp_path / "out", *FAST, "--quiet")
    assert result.exit_code == 0 and result.stderr == ""


def test_table_has_a_line_per_method(tiny_bundle, tmp_path):
    result = generate(tiny_bundle.folder, tmp_path / "out", *FAST, "--baseline")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    methods = [row for row in rows if row[:1] in (["cspd"], ["target"])]
    check_narrow("\n".join(result.stdout.splitlines()[:-2]))  # the last two hold paths
    assert [row[0] for row in methods if row[1] == "1"] == ["cspd", "target"]
    assert methods[-1][-1] == "1.00x"
    out = tmp_path / "out"
    assert result.stdout.splitlines()[-2:] == [
        f"1 image in {out}, preview: {out / 'preview' / 'grid.png'}",
        f"again: cspd-run replay {out / '00000.png'} {tiny_bundle.folder}",
    ]


def test_labels_default_to_one_image_per_class_in_turn():
    names = ("cat", "dog", "Great Dane")
    assert parse_labels("great dane, 1,CAT", names) == (2, 1, 0)


def test_a_name_that_occurs_twice_is_its_first_class():
    assert parse_labels("crane", ("crane", "dog", "crane")) == (0,)


def test_ranges_hold_both_ends():
    names = ("cat", "dog", "cow", "2-step")
    assert parse_labels("0-2,1", names) == (0, 1, 2, 1)
    assert parse_labels("2-step", names) == (3,)


def test_labels_given_twice_add_up(tiny_bundle, tmp_path):
    arguments = (*FAST, "--labels", "1,2", "--labels", "417")
    assert generate(tiny_bundle.folder, tmp_path / "out", *arguments).exit_code == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["labels"] == [1, 2, 417]


@pytest.mark.parametrize(
    ("text", "near"),
    # By letters alone "sea" is nearest to "bag" and "retriever" to "terrier".
    [("sea", "sea slug"), ("retriever", "golden retriever"), ("terier", "terrier")],
)
def test_a_beginning_is_preferred_to_similar_letters(text, near):
    with pytest.raises(CspdError, match=f"nearest is '{near}'"):
        parse_labels(text, ("bag", "golden retriever", "terrier", "sea slug"))


@pytest.mark.parametrize(
    ("program", "verb"), [("cspd.runtime.commands.cli", "generate"), ("cspd.export.cli", "inspect")]
)
def test_the_modules_are_the_commands(program, verb):
    command = [sys.executable, "-m", program, verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"{verb} [OPTIONS]" in done.stdout


@pytest.mark.parametrize("text", ["sneeker", "SNEAKR", "sneakers"])
def test_nearest_class_is_suggested(text):
    with pytest.raises(CspdError, match="nearest is 'sneaker'"):
        parse_labels(text, ("t-shirt", "sneaker", "bag"))


def test_configuration_survives_json():
    config = make_config(labels=(1, 2), num_images=3, seed=2**64 - 1)
    assert type(config).model_validate_json(config.model_dump_json()) == config
    assert [config.label_of(image) for image in range(3)] == [1, 2, 1]


def test_unknown_setting():
    with pytest.raises(CspdError, match="--gama"):
        make_config(labels=(1,), num_images=1, gama=3)


def test_files_of_the_user_are_no_run(tiny_bundle, tmp_path):
    """Whatever they are called; --overwrite is neither offered nor of use."""
    out = tmp_path / "out"
    out.mkdir()
    mine = {
        "settings.json": '{"editor": "vim"}',
        "00007.png": "holiday",
        "images.jsonl": '{"a": 1}',
    }
    for name, text in mine.items():
        (out / name).write_text(text)
    for options in ((), ("--overwrite",)):
        arguments = ["generate", str(tiny_bundle.folder), *FAST, *options, "--out", str(out)]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1 and "holds files that are not a run" in result.stderr
        assert "--overwrite" not in result.stderr
    assert {path.name: path.read_text() for path in out.iterdir()} == mine


def test_a_reason_in_a_file_is_text(tiny_bundle, tmp_path):
    """Not markup of the terminal."""
    arguments = ["generate", str(tiny_bundle.folder), *FAST, "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    settings = tmp_path / "out" / "settings.json"
    written = json.loads(settings.read_text())
    settings.write_text(json.dumps(written | {"choices": {"target": "[/x]"}}))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "target head: [/x]" in result.stderr


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--dry-run",)])
def test_out_that_is_no_folder(tiny_bundle, tmp_path, options):
    """A file, a device, and places below them."""
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "x", "/dev/full", "/dev/full/x"):
        arguments = ["generate", str(tiny_bundle.folder), *FAST, *options, "--out", str(out)]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1, result.output
        there = str(out).removesuffix("/x")
        assert f"{there}: is not a folder" in " ".join(result.output.split())
    assert (tmp_path / "file").read_text() == "mine"
