"""`import cspd` and `python -m cspd`: what they give, and that the parts are packed."""

import importlib
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import cspd
from cspd.__main__ import main

ROOT = Path(__file__).parents[1]


def test_exports():
    assert set(cspd.__all__) == {"CspdError", "Images", "Pipeline", "__version__", "load"}
    assert cspd.__version__ == version("cspd")
    assert all(hasattr(cspd, name) for name in cspd.__all__)
    assert set(cspd.__all__) <= set(dir(cspd))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        cspd.lod  # noqa: B018


def test_every_part_is_packed():
    """With its types: the marker stands at the root."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = setuptools["package-dir"]
    expected = {
        ".".join((part, *path.relative_to(ROOT / folder).parent.parts))
        for part, folder in folders.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sorted(setuptools["packages"]) == sorted(expected)
    for name in expected:
        part, *inside = name.removeprefix("cspd").lstrip(".").split(".") if name != "cspd" else [""]
        home = ROOT / folders[f"cspd.{part}" if part else "cspd"]
        assert Path(importlib.import_module(name).__file__) == home.joinpath(*inside, "__init__.py")
    assert "py.typed" in setuptools["package-data"]["cspd"]
    assert (ROOT / setuptools["package-dir"]["cspd"] / "py.typed").is_file()


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cspd", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_both_commands(arguments):
    done = run(*arguments)
    assert done.returncode == 0 and done.stderr == ""
    assert "cspd-run" in done.stdout and "cspd-export" in done.stdout


def test_another_name_is_a_wrong_argument():
    done = run("generate")
    assert done.returncode == 2 and done.stdout == ""
    assert "no command 'generate'; use run or export" in done.stderr


@pytest.mark.parametrize(("name", "verb"), [("run", "generate"), ("export", "build")])
def test_module_dispatches_to_both_command_lines(capsys, name, verb):
    with pytest.raises(SystemExit) as ended:
        main([name, verb, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"Usage: python -m cspd {name} {verb}")
