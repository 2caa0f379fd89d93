"""Foreign files in the folder of a run, and records that are not as the run wrote them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from killed import contents
from PIL import Image

from cspd.runtime.commands.cli import main
from cspd.runtime.store import journal
from cspd.runtime.store.ownership import run_files
from cspd.runtime.store.seal import CHECK, is_sealed

OPTIONS = (
    "--labels", "1,417", "--num-images", 6, "--num-iter", 2, "--head-steps", 2, "--gamma", 4,
    "--batch-size", 2, "--threads", 1, "--quiet",
)  # fmt: skip
FORMATS = ("png", "webdataset", "npz", "parquet")


def generate(bundle, out, *options: object):
    shards = ("--shard-size", 4) if {"webdataset", "parquet"} & set(options) else ()
    arguments = ("generate", bundle.folder, *OPTIONS, "--out", out, *shards, *options)
    return CliRunner().invoke(main, [str(part) for part in arguments])


@pytest.fixture(scope="module")
def finished(tiny_bundle, tmp_path_factory):
    """Folders of finished runs, by format."""
    folder = tmp_path_factory.mktemp("finished")
    for name in FORMATS:
        result = generate(tiny_bundle, folder / name, "--format", name)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the finished run of loose PNGs."""
    shutil.copytree(finished / "png", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def begun(out):
    """A run whose last two images are missing."""
    lines = journal.read(out / "images.jsonl")
    journal.rewrite(out / "images.jsonl", lines[:4])
    for name in ("00004.png", "00005.png", "run.json", "preview/grid.png"):
        (out / name).unlink()
    return out


def picture(path) -> None:
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_owns_what_it_wrote(finished, tmp_path, name):
    """Also after a kill between a file and its line, and before it packed its images."""
    folder = tmp_path / "out"
    shutil.copytree(finished / name, folder)
    there = json.loads((folder / "settings.json").read_text())
    everything = {path for path in folder.rglob("*") if path.is_file()}
    assert set(run_files(folder, there)) == everything
    for lines in folder.glob("*.jsonl"):
        lines.write_bytes(b"")
    (folder / "pending").mkdir()
    everything |= {folder / "pending" / "00003.png"} if name != "png" else set()
    shutil.copy(finished / "png" / "00003.png", folder / "pending")
    assert set(run_files(folder, there)) == everything


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_owns_no_numbers_beyond_its_own(finished, tmp_path, name):
    folder = tmp_path / "out"
    shutil.copytree(finished / name, folder)
    there = json.loads((folder / "settings.json").read_text())
    before = set(run_files(folder, there))
    shards = {"webdataset": "00002.tar", "parquet": "00002.parquet"}
    others = ["00006.png", "000001.png", "grid.png", shards.get(name, "00000.tar")]
    for other in others:
        shutil.copy(finished / "png" / "00003.png", folder / other)
    assert set(run_files(folder, there)) == before


FOREIGN = {
    "settings.json": '{"editor.fontSize": 12}',
    "run.json": '{"tool": "webpack", "bundle": "main.js", "config": {}}',
    "images.jsonl": '{"url": "a"}\n{"url": "b"}\n',
    "unfinished.jsonl": '{"todo": "a"}\n',
    "00005.png": "my picture",
}


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_in_a_begun_run_is_named_and_stays(tiny_bundle, begun, name, options):
    if name == "settings.json":
        # run.json says which run it is.
        (begun / "settings.json").rename(begun / "run.json")
        record = json.loads((begun / "run.json").read_text())
        record["bundle"] = {"sha256": record["bundle"]}
        (begun / "run.json").write_text(json.dumps(record))
    (begun / name).write_text(FOREIGN[name])
    before = contents(begun)
    result = generate(tiny_bundle, begun, *options)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
    assert f"{begun}: {name}: not written by the run" in result.stderr
    assert "choose another --out" in result.stderr
    assert contents(begun) == before


def test_a_picture_called_like_an_image_is_not_replaced(tiny_bundle, begun):
    """It is a good PNG, but has no settings inside."""
    picture(begun / "00004.png")
    before = contents(begun)
    for options in ((), ("--overwrite",)):
        result = generate(tiny_bundle, begun, *options)
        assert result.exit_code == 1 and f"{begun}: 00004.png: not written" in result.stderr
    assert contents(begun) == before
    (begun / "00004.png").unlink()
    assert generate(tiny_bundle, begun).exit_code == 0


def test_overwriting_with_more_images_stops_at_a_foreign_one(tiny_bundle, out):
    picture(out / "00007.png")
    before = contents(out)
    result = generate(tiny_bundle, out, "--overwrite", "--num-images", 8)
    assert result.exit_code == 1 and "00007.png: not written" in result.stderr
    assert contents(out) == before
    assert generate(tiny_bundle, out, "--overwrite", "--seed", 3).exit_code == 0
    assert (out / "00007.png").read_bytes() == before["00007.png"]


def test_files_of_no_run_are_named_and_nothing_is_touched(tiny_bundle, tmp_path):
    """A torn line is cut out of a list of ours only."""
    mine = FOREIGN | {"unfinished.jsonl": "no JSON\n", ".run.json.12.tmp": "half"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    for options in ((), ("--overwrite",)):
        result = generate(tiny_bundle, tmp_path, *options)
        assert result.exit_code == 1
        assert "not a run (00005.png, images.jsonl, run.json, ...)" in result.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == mine


def test_overwriting_keeps_the_proof_until_the_end(tiny_bundle, out, monkeypatch):
    """Whatever ends it in between leaves a run that can be overwritten."""
    real, removed = Path.unlink, []

    def until_the_last(self, *rest, **more):
        if self.parent == out and self.name[0] != ".":
            removed.append(self.name)
            if len(removed) == 9:
                raise OSError(5, "bad disk")
        real(self, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", until_the_last)
        generate(tiny_bundle, out, "--overwrite", "--seed", 3)
    assert removed[-3:] == ["images.jsonl", "run.json", "settings.json"]
    assert generate(tiny_bundle, out, "--overwrite", "--seed", 3).exit_code == 0


def test_a_record_has_its_checksum(finished):
    for name in FORMATS:
        record = json.loads((finished / name / "run.json").read_text())
        assert is_sealed(record) and not is_sealed(record | {"seconds": 1.0})


ODD = {
    "distribution": 7,
    "certificate": "guaranteed",
    "images": "6",
    "seconds": -1.0,
    "seconds_per_image": 0.25,
    "statistics": [],
    "graphs": {"decoder": {"calls": "many", "seconds": 0}},
    "host": {"python": 3.11},
    "session": {"images": "all", "wall_seconds": 1.0, "workers": 1},
    "notes": [1],
    "cuda_graphs": "none",
    "baseline": {"method": "target"},
    "files": [],
    "news": 1,
}


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("key", ODD)
def test_a_record_that_says_something_else_is_written_again(tiny_bundle, out, key, checked):
    """By its checksum, or by its values in a record that was written without one."""
    record = json.loads((out / "run.json").read_text())
    changed = record | {key: ODD[key]}
    if not checked:
        del changed[CHECK]
    (out / "run.json").write_text(json.dumps(changed))
    result = generate(tiny_bundle, out, "--json")
    assert result.exit_code == 0, result.output
    again = json.loads((out / "run.json").read_text())
    assert is_sealed(again) and again.get("distribution") == record["distribution"]
    assert again.get(key) != ODD[key] and json.loads(result.stdout).get(key) != ODD[key]


def test_a_record_without_checksum_is_believed(tiny_bundle, out):
    """As versions wrote it that had none: with its times, which nothing else tells."""
    record = json.loads((out / "run.json").read_text())
    del record[CHECK]
    (out / "run.json").write_text(json.dumps(record))
    result = generate(tiny_bundle, out, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["seconds"] == record["seconds"]
    assert json.loads((out / "run.json").read_text()) == record


def test_a_baseline_without_checksum_is_believed(tiny_bundle, tmp_path):
    assert generate(tiny_bundle, tmp_path / "out", "--baseline").exit_code == 0
    path = tmp_path / "out" / "run.json"
    record = json.loads(path.read_text())
    del record[CHECK]
    for baseline, believed in ((record["baseline"], True), ({"method": "x"}, False)):
        path.write_text(json.dumps(record | {"baseline": baseline}))
        assert generate(tiny_bundle, tmp_path / "out").exit_code == 0
        assert ("baseline" in json.loads(path.read_text())) is believed


def test_a_late_baseline_is_refused_with_what_helps(tiny_bundle, out):
    before = contents(out)
    result = generate(tiny_bundle, out, "--baseline")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"{out}: the run was finished without --baseline" in result.stderr
    assert "another --out, or add --overwrite" in result.stderr and contents(out) == before
    result = generate(tiny_bundle, out, "--baseline", "--overwrite", "--json")
    assert result.exit_code == 0 and "baseline" in json.loads(result.stdout)
    result = generate(tiny_bundle, out, "--baseline", "--json")
    assert result.exit_code == 0 and "baseline" in json.loads(result.stdout)


def test_a_record_that_was_changed_is_not_reported(out, tmp_path):
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"distribution": "exact"}))
    result = CliRunner().invoke(main, ["report", str(out), "--out", str(tmp_path / "r.html")])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"{out / 'run.json'}: was changed since the run wrote it" in result.stderr
    assert f"--out {out} writes it again" in result.stderr and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("name", ["unfinished.jsonl", "shards.jsonl", "images.jsonl"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_list_of_somebody_else_is_named_and_stays(tiny_bundle, begun, name, options):
    """Also one that is no JSON at all."""
    (begun / name).write_text("milk\neggs\n")
    result = generate(tiny_bundle, begun, *options)
    assert result.exit_code == 1 and name in result.stderr
    assert (begun / name).read_text() == "milk\neggs\n"


def test_a_picture_among_images_that_wait_for_their_shard(tiny_bundle, finished, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished / "npz", folder)
    (folder / "pending").mkdir()
    picture(folder / "pending" / "00000.png")
    before = contents(folder)
    result = generate(tiny_bundle, folder, "--format", "webdataset", "--overwrite")
    assert result.exit_code == 1 and "pending/00000.png" in result.stderr
    assert contents(folder) == before


def test_a_record_outlives_a_line_that_was_changed(tiny_bundle, out):
    """Every image is intact and the line says what it did once it is derived again."""
    before = contents(out)
    text = (out / "images.jsonl").read_text()
    (out / "images.jsonl").write_text(text.replace('"label": 1,', '"label": 5,', 1))
    assert (out / "images.jsonl").read_text() != text
    assert generate(tiny_bundle, out).exit_code == 0
    assert contents(out) == before
