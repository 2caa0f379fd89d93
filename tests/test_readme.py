"""The README's commands exist, and those that need nothing but the package do what it says."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from cspd.export.cli import main as export_main
from cspd.runtime.cli import main as run_main

README = (Path(__file__).parents[1] / "README.md").read_text()
PROGRAMS = {"cspd-run": run_main, "cspd-export": export_main}
QUICK = ["--num-iter", "4", "--head-steps", "4", "--threads", "1", "--quiet"]


def commands() -> list[list[str]]:
    """Every command line of ours in the README's code blocks, without its comment."""
    blocks = re.findall(r"```\n(.*?)```", README, flags=re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words and words[0] in PROGRAMS]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_options_exist(words):
    program, verb, *arguments = words
    result = CliRunner().invoke(PROGRAMS[program], [verb, *arguments, "--help"])
    assert result.exit_code == 0, result.output


def test_generate_and_replay_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = [words for words in commands() if words[1] in ("generate", "replay")]
    generate = next(words for words in wanted if "out/shoes" in words)
    replay = next(words for words in wanted if words[1] == "replay")
    runner = CliRunner()
    made = runner.invoke(run_main, [*generate[1:], *QUICK])
    assert made.exit_code == 0, made.output
    assert len(list(Path("out/shoes").glob("0*.png"))) == 8
    again = runner.invoke(run_main, [*replay[1:], "--threads", "1"])
    assert again.exit_code == 0 and "identical" in again.output
