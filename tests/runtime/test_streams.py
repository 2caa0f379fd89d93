"""Output that goes nowhere: one line, an exit code, and every image kept."""

import subprocess
import sys

import pytest

CODE = "from cspd.runtime.commands.cli import main; main()"
LOST = "Error: stdout: cannot be written to: {}; the command itself ran to its end"


def shell(redirections: str, *arguments: object) -> subprocess.CompletedProcess:
    """`cspd-run ARGUMENTS` with the redirections of a shell."""
    script = f'"$@" {redirections}'
    command = ["sh", "-c", script, "sh", sys.executable, "-c", CODE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def generate(bundle, out) -> tuple:
    return (
        "generate", bundle.folder, "--labels", "1", "--num-images", 1, "--num-iter", 2,
        "--head-steps", 2, "--batch-size", 1, "--threads", 1, "--out", out, "--quiet",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("redirections", "code", "reason"),
    [
        (">/dev/full", 1, "No space left on device"),
        (">&-", 1, "Bad file descriptor"),
        ("2>&-", 0, None),
        ("2>/dev/full", 0, None),
        ("<&- >&- 2>&-", 1, None),
    ],
)
def test_images_are_kept(tiny_bundle, tmp_path, redirections, code, reason):
    out = tmp_path / "out"
    done = shell(redirections, *generate(tiny_bundle, out))
    assert done.returncode == code, done.stderr
    assert {path.name for path in out.iterdir()} == {
        "00000.png", "images.jsonl", "run.json", "settings.json", "preview",
    }  # fmt: skip
    if reason:
        assert done.stderr.count("\n") == 1 and LOST.format(reason) in done.stderr
    else:
        assert done.stderr == ""
    # Nothing that was printed went into a file of the run.
    assert all(line.startswith("{") for line in (out / "images.jsonl").read_text().splitlines())


def test_reader_that_leaves_is_no_error_of_ours():
    done = shell("| true", "--help")
    assert done.stderr == ""
