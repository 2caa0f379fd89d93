"""The pages: links resolve, the README is short, generated pages are current, commands exist."""

import importlib
import re

import pytest
from click.testing import CliRunner
from documents import PAGES, PROGRAMS, ROOT, Command, commands, prose

from cspd.export.cli import main as export_main
from cspd.runtime.commands.cli import main as run_main

GROUPS = dict(zip(PROGRAMS, (run_main, export_main), strict=True))
README = (ROOT / "README.md").read_text()
# A duration, what is needed, or that it does not end by itself.
MARK = re.compile(r"\b\d+ (s|min|hours?)\b|[Mm]inutes?\b|seconds\b|hour|GPU|until it is stopped")
OWN = "bundles/mar-h-b"  # what the README builds from checkpoints; its how-to page has durations
QUICK = ["--num-iter", "2", "--head-steps", "2", "--threads", "1", "--quiet"]


def anchors(text: str) -> set[str]:
    """What links into a page may end in, as GitHub makes it from headings."""
    heads = re.findall(r"^#+ (.*)$", prose(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("name", ["DESIGN.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name):
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", (ROOT / name).read_text())
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_readme_is_short():
    assert len(README.split()) <= 600
    assert max(map(len, README.splitlines())) <= 120


def test_every_page_is_linked_from_another():
    linked = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"\]\(([^)#\s]+)", page.read_text())
    }
    assert [page for page in PAGES if page not in linked and page.name != "README.md"] == []


def test_generated_pages_are_what_the_code_says():
    pytest.importorskip("ray", reason="ray is not installed")
    pages = importlib.import_module("cspd.tools.docs.reference").pages()
    for name, text in pages.items():
        assert (ROOT / "docs/reference" / name).read_text() == text, (
            f"{name}: write it again with python -m cspd.tools.docs.reference"
        )


def test_reference_explains_every_part_of_a_run():
    page = (ROOT / "docs/reference/run-json.md").read_text()
    parts = re.findall(r"^- `(\w+)`: (.*)", page.partition("## statistics")[0], flags=re.M)
    assert {"schema", "config", "statistics", "host"} <= {name for name, _ in parts}
    assert [name for name, text in parts if not text.partition("; ")[2]] == []


@pytest.mark.parametrize("command", commands(), ids=str)
def test_options_exist(command: Command):
    if command.words[0] in GROUPS:
        program, arguments = GROUPS[command.words[0]], command.words[1:]
    else:
        module = importlib.import_module(command.words[2])
        program, arguments = getattr(module, "main", None) or module.command, command.words[3:]
    result = CliRunner().invoke(program, [*arguments, "--help"])
    assert result.exit_code == 0, result.output


def is_run(command: Command) -> bool:
    """Whether a test below runs it: the quick ones of the README and the quickstart."""
    verb = command.words[1]
    if verb in ("inspect", "triton"):
        return command.words[2].startswith("demo_pair")
    walked = command.page in ("README.md", "docs/quickstart.md")
    return verb == "doctor" or (
        walked and verb in ("generate", "replay") and OWN not in command.words
    )


@pytest.mark.parametrize("command", commands(), ids=str)
def test_commands_are_run_here_or_say_what_they_take(command: Command):
    real_pair = command.page == "README.md" and OWN in command.words
    assert is_run(command) or real_pair or MARK.search(command.context), (
        "add its duration and hardware to its section"
    )


def test_quick_commands_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_pair").symlink_to(ROOT / "demo_pair")
    seen = set()
    for command in filter(is_run, commands()):
        program, *arguments = command.words
        if command.words in seen:
            continue
        seen.add(command.words)
        kind = arguments[0]
        extra = {"generate": QUICK, "replay": ["--threads", "1"]}.get(kind, [])
        result = CliRunner().invoke(GROUPS[program], [*arguments, *extra])
        assert result.exit_code == 0, f"{command}\n{result.output}"
        if kind == "generate":
            out = tmp_path / arguments[arguments.index("--out") + 1]
            assert len(list(out.glob("0*.png"))) == int(
                arguments[arguments.index("--num-images") + 1]
            )
        assert kind != "replay" or "identical" in result.output
    assert {words[1] for words in seen} == {"generate", "replay", "doctor", "inspect", "triton"}


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs/how-to/troubleshooting.md").read_text()
    parts = ("engines", "export", "runtime", "tools")
    code = "\n".join(f.read_text() for part in parts for f in (ROOT / part).rglob("*.py"))
    # Messages are written as several strings, one a line.
    code = re.sub(r"\"\s*\n\s*f?\"", "", code)
    rows = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    assert len(rows) >= 10
    assert [fragment for fragment in rows if fragment not in code] == []
