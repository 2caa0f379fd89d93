"""What every verb of `cspd-run` has in common: help, defaults, new folders, endings, completion."""

import json
import shlex

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from narrow import check_narrow

from cspd.engines.console.commands import OTHER, ToolCommand, Verb
from cspd.export.cli import main as export_main
from cspd.runtime.commands.cli import main
from cspd.runtime.config import RunConfig, about
from cspd.runtime.settings import shipped_bundle

FAST = ("--num-images", "2", "--num-iter", "2", "--head-steps", "2", "--batch-size", "1")
OURS = ("generate", "replay", "doctor", "tune", "serve")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def verb(name) -> click.Command:
    context = main.make_context("cspd-run", ["--help"], resilient_parsing=True)
    found = main.commands[name]
    if isinstance(found, ToolCommand):
        found = found.make_context(name, [], context, resilient_parsing=True).command
    return found


@pytest.mark.parametrize("name", OURS)
def test_help_of_a_verb(name):
    """Every option has help, a group and its default; the examples are commands of this verb."""
    found = verb(name)
    assert isinstance(found, Verb) and found.example
    context = click.Context(found, show_default=True)
    for option in (param for param in found.params if isinstance(param, click.Option)):
        assert option.help and option.group != OTHER, option.name
        if not option.is_flag:
            assert "default" in option.get_help_extra(context), option.name
    for line in found.example.splitlines():
        assert len(line) <= 78
        program, called, *arguments = shlex.split(line)
        assert (program, called) == ("cspd-run", name)
        parser = found.make_parser(context)
        assert parser.parse_args(list(arguments))[1] == []  # no argument that the verb lacks


@pytest.mark.parametrize("program", [main, export_main])
def test_the_list_of_verbs_has_whole_sentences(program, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = CliRunner().invoke(program, ["--help"]).stdout.partition("Commands:")[2]
    verbs = listed.strip().splitlines()
    assert len(verbs) == len(program.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in verbs)


def test_an_option_stands_once():
    """The options that decide about images are the fields of RunConfig, with their bounds."""
    names = {option.name for option in verb("generate").params}
    told = {name for name in RunConfig.model_fields if about(name)}
    assert told == set(RunConfig.model_fields) - {"labels", "heads"} and told < names
    text = " ".join(run("generate", "--help").stdout.split())
    assert "Autoregressive steps. [default: the bundle's; shipped pair: 49; 1 or more]" in text
    assert "[default: by measured costs; 1..64]" in text
    assert "[default: align]" in text and "--align / --no-align" in text


def test_runs_without_out_never_collide(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002"):
        result = run("generate", tiny_bundle.folder, *FAST, "--threads", 1)
        assert result.exit_code == 0, result.output
        out = f"out/generate-{number}"
        assert result.stdout.splitlines()[-2:] == [
            f"2 images in {out}, preview: {out}/preview/grid.png",
            f"again: cspd-run replay {out}/00000.png {tiny_bundle.folder}",
        ]
    # What the last line says can be typed.
    again = shlex.split(result.stdout.splitlines()[-1])[3:]
    replayed = run("replay", *again, "--threads", 1)
    assert replayed.stdout == "out/generate-002/00000.png: identical\n"
    record = run("replay", *again, "--threads", 1, "--out", "copy.png", "--json").stdout
    assert json.loads(record) == {
        "image": "out/generate-002/00000.png", "identical": True, "made": ["copy.png"]
    }  # fmt: skip
    refused = run("generate", tiny_bundle.folder, *FAST, "--overwrite")
    assert refused.exit_code == 2 and "--overwrite: changes nothing without --out" in refused.stderr


def test_a_run_that_cannot_begin_leaves_no_folder(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("generate", tiny_bundle.folder, "--num-iter", 17).exit_code == 2
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert run("generate", tiny_bundle.folder, *FAST).exit_code == 1
    assert list(tmp_path.glob("out/*")) == []


def completions(*typed: str) -> list[str]:
    shell = ShellComplete(main, {}, "cspd-run", "_CSPD_RUN_COMPLETE")
    return [item.value for item in shell.get_completions(list(typed[:-1]), typed[-1])]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("ge",), ["generate"]),
        (("generate", "--method", "l"), ["lossless"]),
        (("generate", "--labels", "sn"), ["sneaker"]),
        (("generate", "--labels", "bag,Sn"), ["bag,sneaker"]),
        (("generate", str(shipped_bundle()), "--labels", "trou"), ["trouser"]),
        (("generate", "no-such-bundle", "--labels", "s"), []),
        (("serve", "--device", ""), ["cpu", "cuda"]),
        (("tune", "--backend", "tensorrt-"), ["tensorrt-rtx"]),
    ],
)
def test_the_shell_completes(typed, expected):
    assert completions(*typed) == expected


def test_doctor_says_what_runs_and_what_to_do_next():
    shown = run("doctor").stdout
    check_narrow(shown)
    last = shown.splitlines()[-1]
    assert last.startswith("runs here: torch, onnxruntime")
    assert last.endswith("next: cspd-run generate --backend onnxruntime")
    assert json.loads(run("doctor", "--json").stdout)["made"] == []
