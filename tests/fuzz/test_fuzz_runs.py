"""Folders of runs nobody vouches for: a run resumes in them, or says why not."""

import json
import shutil

import pytest
from click.testing import CliRunner
from harness import budget, check, run_case, run_command
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import Edit, apply, damaged, edits

from cspd.runtime.commands.cli import main

ARGUMENTS = ["generate", "--labels", "1,2", "--method", "cspd", "--num-iter", "3", "--head-steps",
             "3", "--batch-size", "1", "--threads", "1", "--quiet"]  # fmt: skip
RECORDS = ("run.json", "settings.json", "images.jsonl", "unfinished.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and the same run with its journal still there."""
    folder = tmp_path_factory.mktemp("run") / "out"
    done = CliRunner().invoke(main, [*ARGUMENTS, "--out", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


def resume(arena, target: str, finished, name: str, content: bytes, options: list[str]) -> None:
    """Go on in a copy of the run whose record `name` is `content`; the images must be right."""
    folder = arena.fresh() / "out"
    shutil.copytree(finished, folder)
    if name == "unfinished.jsonl":
        (folder / "run.json").unlink()
    (folder / name).write_bytes(content)
    call = run_command(main, [*ARGUMENTS, *options, "--out", str(folder)])
    ending = check(run_case(target, call, folder.parent))
    if ending.kind == "ok":
        for image in ("00000.png", "00001.png"):
            assert (folder / image).read_bytes() == (finished / image).read_bytes()


OPTIONS = st.sampled_from([[], [], ["--overwrite"], ["--json"]])


@budget(full=12, ci=4)
@given(data=st.data(), options=OPTIONS)
def test_run_record(arena, finished, data, options):
    document = json.loads((finished / "run.json").read_text())
    content = apply(document, data.draw(edits(document)))
    resume(arena, "run.json: resume", finished, "run.json", content, options)


@budget(full=12, ci=4)
@given(data=st.data(), options=OPTIONS, cut=st.integers(0, 20))
def test_lines_of_images(arena, finished, data, options, cut):
    lines = [json.loads(line) for line in (finished / "images.jsonl").read_text().splitlines()]
    changed = json.loads(apply(lines, data.draw(edits(lines))))
    changed = changed if isinstance(changed, list) else [changed]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in changed)
    content = content[: len(content) - cut]
    resume(arena, "images.jsonl: resume", finished, "images.jsonl", content, options)


@budget(full=12, ci=4)
@given(data=st.data(), name=st.sampled_from(RECORDS), options=OPTIONS)
@example(data=None, name="images.jsonl", options=[])
def test_bytes(arena, finished, data, name, options):
    there = finished / name
    content = there.read_bytes() if there.exists() else b'{"images": 1, "seconds": 1.0}'
    content = b"[" * 100_000 + b"\n" if data is None else data.draw(damaged(content + b"\n"))
    resume(arena, f"{name}: damaged", finished, name, content, options)


@budget(full=12, ci=4)
@given(data=st.data())
def test_journals(arena, finished, data):
    tally = {"images": 1, "seconds": 1.0, "statistics": {}, "calls": {}, "check": "0" * 16}
    document = [tally, tally]
    changed = json.loads(apply(document, data.draw(edits(document))))
    changed = changed if isinstance(changed, list) else [changed]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in changed)
    resume(arena, "unfinished.jsonl: resume", finished, "unfinished.jsonl", content, [])


def test_image_lines_that_name_other_files(arena, finished):
    """A line's file name is never opened: the name follows from the number."""
    lines = [json.loads(line) for line in (finished / "images.jsonl").read_text().splitlines()]
    for name in ("../../secret.txt", "/etc/passwd", "\0", ""):
        changed = apply(lines, [Edit((0, "file"), name)])
        content = b"".join(json.dumps(line).encode() + b"\n" for line in json.loads(changed))
        resume(arena, "images.jsonl: resume", finished, "images.jsonl", content, [])
