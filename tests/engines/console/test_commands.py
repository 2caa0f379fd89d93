"""What both command lines share, on a small command line of its own."""

import json
from concurrent.futures import ThreadPoolExecutor

import click
import pytest
from click.testing import CliRunner

from cspd.engines.console.commands import (
    METHOD,
    OUTPUT,
    Choice,
    Commands,
    finish,
    json_option,
    new_out,
    option,
)
from cspd.engines.errors import CspdError, SettingError


@click.group(cls=Commands)
def main():
    """A small one."""


@main.command(example="small make --size large\nsmall make --json")
@option("--size", default="small", type=Choice(["small", "large"]), group=METHOD, help="How big.")
@option("--out", show_default="out/make-001", group=OUTPUT, help="Where.")
@json_option
def make(size, out, as_json):
    """Make a thing."""
    finish(as_json, {"size": size}, ["a.png"], f"1 thing of size {size}", "again: small make")


@main.command()
@click.argument("kind")
def fail(kind):
    """Fail."""
    raise {"setting": SettingError, "other": CspdError}[kind]("too bad")


def run(*arguments):
    return CliRunner().invoke(main, arguments)


def test_help_stands_in_groups_shows_defaults_and_ends_with_examples():
    lines = run("make", "--help").stdout.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Method:", "Output:", "Options:", "Examples:"]
    assert any("--size" in line and "[default: small]" in line for line in lines)
    assert any("--out" in line and "[default: out/make-001]" in line for line in lines)
    assert lines[-2:] == ["  small make --size large", "  small make --json"]


@pytest.mark.parametrize(
    ("arguments", "near"), [(["mak"], "'make'"), (["make", "--size", "smal"], "'small'")]
)
def test_the_nearest_is_suggested(arguments, near):
    result = run(*arguments)
    assert result.exit_code == 2 and f"Did you mean {near}?" in result.stderr


@pytest.mark.parametrize(("kind", "code"), [("setting", 2), ("other", 1)])
def test_wrong_values_exit_2_and_failures_1(kind, code):
    result = run("fail", kind)
    assert (result.exit_code, result.stderr) == (code, "Error: too bad\n")


def test_the_ending_is_for_people_or_for_machines():
    assert run("make").stdout == "1 thing of size small\nagain: small make\n"
    assert json.loads(run("make", "--json").stdout) == {"size": "small", "made": ["a.png"]}


def test_new_folders_count_up_and_never_collide(tmp_path):
    parent = tmp_path / "out"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_out("run", parent=parent), range(24)))
    assert {path.name for path in made} == {f"run-{number:03d}" for number in range(1, 25)}
    (parent / "run-007").rmdir()  # a number that was given is not given again
    assert new_out("run", parent=parent).name == "run-025"
    assert new_out("report", ".html", parent).name == "report-001.html"
    assert new_out("report", ".html", parent).is_file()


def test_new_folder_where_nothing_can_be_written(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CspdError, match="cannot write there"):
        new_out("run", parent=tmp_path / "out")
