"""Names that are bytes and no text: what is printed is valid everywhere, and can be typed."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cspd.engines.words import shell
from cspd.export.cli import main as export_main
from cspd.runtime.commands.cli import main

QUICK = ("--labels", "1", "--num-iter", 2, "--head-steps", 2, "--batch-size", 1, "--threads", 1)
CODE = "import sys; from cspd.{} import main; main(sys.argv[1:])"


@pytest.fixture
def odd(tmp_path):
    """A folder whose name is no text."""
    folder = tmp_path / os.fsdecode(b"a\xff b")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes text only")
    return folder


def invoke(command, *arguments: object):
    """As under a locale whose output takes no stray bytes."""
    return CliRunner().invoke(command, [str(each) for each in arguments])


def valid(text: str) -> object:
    """The object in JSON; halves of surrogate pairs, which other readers refuse, raise."""
    found = json.loads(text)
    json.dumps(found, ensure_ascii=False).encode()
    return found


@pytest.mark.parametrize("as_json", [False, True])
def test_every_verb_prints_valid_text(tiny_bundle, odd, as_json):
    options, bundle = ("--json",) * as_json, tiny_bundle.folder
    image, page = odd / "out" / "00000.png", odd / "r.html"
    verbs = [
        (main, "generate", bundle, *QUICK, "--out", odd / "out"),
        (main, "generate", bundle, *QUICK, "--out", odd / "out"),
        (main, "replay", image, bundle, "--threads", 1, "--out", odd / "again.png"),
        (main, "report", odd / "out", "--out", page, "--markdown", odd / "r.md"),
        (export_main, "parity", bundle, "--rung", "graphs", "--out", odd / "p.json"),
        (export_main, "lint", shutil.copy(bundle / "decoder/decoder.onnx", odd)),
    ]
    for verb, *arguments in verbs:
        result = invoke(verb, *arguments, *options)
        assert result.exit_code == 0, result.output
        result.stdout.encode()
        if as_json:
            valid(result.stdout)
    valid((odd / "p.json").read_text())


def test_inspect_names_a_command_that_can_be_typed(tiny_bundle, odd):
    shutil.copytree(tiny_bundle.folder, odd / "bundle")
    result = invoke(export_main, "inspect", odd / "bundle")
    assert result.exit_code == 0, result.output
    assert r"a\xff b/bundle'" in result.stdout.splitlines()[-1]
    assert invoke(export_main, "inspect", odd / "bundle", "--json").exit_code == 0


def test_a_bundle_that_onnxruntime_cannot_open_is_refused_in_a_line(tiny_bundle, odd):
    shutil.copytree(tiny_bundle.folder, odd / "bundle")
    result = invoke(main, "generate", odd / "bundle", *QUICK, "--out", odd / "out")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "onnxruntime opens only paths in UTF-8; rename the folder" in result.stderr


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape", "latin-1:strict"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_output_is_text_in_every_encoding(odd, encoding, options):
    """Of a process with its own streams, which tests in this one have not."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    arguments = ("generate", *QUICK, "--quiet", "--out", odd, *options)
    command = [sys.executable, "-c", CODE.format("runtime.commands.cli"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    done.stdout.decode(encoding.partition(":")[0])


@pytest.mark.parametrize("name", [b"a\xff b", b"it's\n", "ä b".encode(), b"plain", b"\\\xfe'$x"])
def test_words_are_read_back_by_a_shell(name):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    line = shell("printf", "%s", Path(os.fsdecode(name)))
    assert line.isprintable()
    assert subprocess.run(["bash", "-c", line], capture_output=True).stdout == name
    if name == b"plain":
        assert shlex.split(line) == ["printf", "%s", "plain"]
