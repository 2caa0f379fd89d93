"""Whatever ends a run, the same command resumes it, and the files come out the same to the byte."""

import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
from click.testing import CliRunner
from killed import contents, send_after, start, wait

from cspd.engines.errors import CspdError
from cspd.runtime.commands.cli import main
from cspd.runtime.config import make_config
from cspd.runtime.store import journal
from cspd.runtime.store.folder import RunFolder, spans
from cspd.runtime.store.formats import Layout
from cspd.runtime.store.resume import open_run

NUM_IMAGES, SHARD = 24, 10
OPTIONS = (
    "--labels", "1,417", "--num-images", NUM_IMAGES, "--num-iter", 2, "--head-steps", 2, "--gamma",
    4, "--batch-size", 4, "--threads", 1, "--quiet",
)  # fmt: skip
# The only file that tells of times and therefore differs between two runs.
TIMES = "run.json"
KILLS = 30


def command(bundle, out, *options: object) -> list:
    shards = ("--shard-size", SHARD) if {"webdataset", "parquet"} & set(options) else ()
    return ["generate", bundle.folder, *OPTIONS, "--out", out, *shards, *options]


def run_here(bundle, out, *options: object):
    return CliRunner().invoke(main, [str(part) for part in command(bundle, out, *options)])


@pytest.fixture(scope="module")
def undisturbed(tiny_bundle, tmp_path_factory):
    """Folders of runs that nothing disturbed, by format."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("png", "webdataset", "npz", "parquet"):
        result = run_here(tiny_bundle, folder / name, "--format", name)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def unfinished(tiny_bundle, undisturbed, tmp_path):
    """A run of loose PNGs as it is after the first 12 images."""
    out = tmp_path / "out"
    with open_run(out, config_of(undisturbed), tiny_bundle, Layout()):
        pass
    lines = journal.repair(undisturbed / "png" / "images.jsonl")[:12]
    journal.append(out / "images.jsonl", lines)
    for line in lines:
        shutil.copy(undisturbed / "png" / line["file"], out)
    return out


def config_of(undisturbed):
    return make_config(**json.loads((undisturbed / "png" / "run.json").read_text())["config"])


@pytest.mark.parametrize("name", ["png", "webdataset"])
def test_killed_at_random_moments(tiny_bundle, undisturbed, tmp_path, name):
    """Nothing lost, nothing double: after each kill, what was promised before is still there."""
    arguments = ("--format", name)
    begin = time.perf_counter()
    assert wait(start(command(tiny_bundle, tmp_path / "first", *arguments), tmp_path / "log")) == 0
    duration = time.perf_counter() - begin
    moments, expected = random.Random(1), contents(undisturbed / name, TIMES)
    kills, round_number = 0, 0
    while kills < KILLS // 2:
        round_number += 1
        out, promised, code = tmp_path / f"out{round_number}", set(), -signal.SIGKILL
        while code == -signal.SIGKILL:
            child = start(command(tiny_bundle, out, *arguments), tmp_path / "log")
            code = send_after(child, moments.uniform(0, duration))
            kills += code == -signal.SIGKILL
            now = promises(out)
            assert promised <= now
            promised = now
        assert code == 0, (tmp_path / "log").read_text()
        assert contents(out, TIMES) == expected
    assert kills >= KILLS // 2


def promises(out) -> set[tuple[int, str]]:
    """Images and hashes of the whole lines of `images.jsonl`, read without repairing it."""
    if not (out / "images.jsonl").exists():
        return set()
    whole = [
        raw for raw in (out / "images.jsonl").read_bytes().splitlines(True) if raw[-1:] == b"\n"
    ]
    lines = [json.loads(raw) for raw in whole]
    return {(line["image"], line["sha256"]) for line in lines}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_batch_and_says_how_to_go_on(
    tiny_bundle, undisturbed, tmp_path, number
):
    log, out = tmp_path / "log", tmp_path / "out"
    # Many more steps than in other tests, so that the signal comes before the end.
    slow = ("--num-images", 400, "--num-iter", 16)
    child = start(command(tiny_bundle, out, *slow), log)
    while len(promises(out)) < 4:
        time.sleep(0.02)
    assert send_after(child, 0.0, number) == 128 + number
    done = len(promises(out))
    assert 0 < done < 400 and done % 4 == 0
    name = signal.Signals(number).name
    last = log.read_text().splitlines()[-1]
    assert last == (
        f"Error: {out}: {done} of 400 images are safe on disk (0..{done - 1}), stopped by {name}; "
        f"the same command with --out {out} resumes"
    )
    assert not list(out.glob(".*"))
    # It resumes where it was: nothing that was there is made again.
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    child = start(command(tiny_bundle, out, *slow), log)
    while len(promises(out)) < done + 4:
        time.sleep(0.02)
    assert send_after(child, 0.0, signal.SIGINT) == 128 + signal.SIGINT
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_goes_on_after_twelve_images(tiny_bundle, undisturbed, unfinished):
    made = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.png")}
    assert len(made) == 12
    result = run_here(tiny_bundle, unfinished, "--json")
    assert result.exit_code == 0, result.output
    assert contents(unfinished, TIMES) == contents(undisturbed / "png", TIMES)
    assert {name: (unfinished / name).stat().st_mtime_ns for name in made} == made
    # Counts are those of the images that were made here.
    assert json.loads(result.stdout)["statistics"]["images"] == NUM_IMAGES - 12


def test_finished_run_is_checked_and_left_alone(tiny_bundle, undisturbed, tmp_path):
    for name in ("png", "parquet"):
        out = tmp_path / name
        shutil.copytree(undisturbed / name, out)
        result = run_here(tiny_bundle, out, "--format", name)
        assert result.exit_code == 0
        preview = out / "preview" / "grid.png"
        assert f"24 images in {out}, preview: {preview}" in result.stdout.splitlines()
        record = json.loads((out / "run.json").read_text())
        (row,) = [line for line in result.stdout.splitlines() if line.strip().startswith("cspd")]
        shown = row.split()
        calls = record["statistics"]["target_calls"], record["statistics"]["draft_calls"]
        assert shown[:3] == ["cspd", "24", f"{record['seconds']:.2f}"]
        assert shown[5:7] == [str(number) for number in calls]
        assert contents(out) == contents(undisturbed / name)


DAMAGE = {
    "changed byte": lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize(
    ("name", "damaged"),
    [("png", "00005.png"), ("webdataset", "00001.tar"), ("webdataset", "00000.tar")],
)
def test_damaged_file_is_made_again(tiny_bundle, undisturbed, tmp_path, case, name, damaged):
    out = tmp_path / "out"
    shutil.copytree(undisturbed / name, out)
    DAMAGE[case](out / damaged)
    result = run_here(tiny_bundle, out, "--format", name)
    assert result.exit_code == 0, result.output
    assert contents(out, TIMES) == contents(undisturbed / name, TIMES)


def test_lost_grid_of_shards(tiny_bundle, undisturbed, tmp_path):
    """The loose images it is made of are gone: they are made again, the shards are kept."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed / "webdataset", out)
    (out / "run.json").unlink()
    (out / "preview" / "grid.png").unlink()
    assert run_here(tiny_bundle, out, "--format", "webdataset").exit_code == 0
    assert contents(out, TIMES) == contents(undisturbed / "webdataset", TIMES)


def edit_line(path, index: int, **changes) -> None:
    """Change a line as a bad disk or a careless hand does; None removes a key."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    changed = {**lines[index], **changes}
    lines[index] = {name: value for name, value in changed.items() if value is not None}
    path.write_bytes(journal.encode(lines))


LIES = {
    "label": {"label": 416},
    "label of another kind": {"label": {"a": 1}},
    "class": {"class": "goldfsh"},
    "path": {"file": "../../../etc/passwd"},
    "no file": {"file": None},
    "count": {"accepted": 3},
    "negative count": {"proposed": -1, "accepted": -1},
    "count of another kind": {"proposed": "many"},
    "no count": {"fallback": None},
    "hash": {"sha256": "0" * 64},
    "hash of another kind": {"sha256": 7},
    "number": {"image": 4},
    "no checksum": {"check": None},
}


@pytest.mark.parametrize("case", LIES)
def test_line_that_lies(tiny_bundle, undisturbed, tmp_path, case):
    """In a finished run and in an unfinished one: the files come out as if it told the truth."""
    for name, begun in (("png", False), ("npz", True)):
        out = tmp_path / name
        shutil.copytree(undisturbed / name, out)
        edit_line(out / "images.jsonl", 5, **LIES[case])
        if begun:
            (out / "run.json").unlink()
            (out / "samples.npz").unlink()
            (out / "shards.jsonl").unlink()
            (out / "preview" / "grid.png").unlink()
            (out / "pending").mkdir()
            for path in (undisturbed / "png").glob("*.png"):
                shutil.copy(path, out / "pending")
        assert run_here(tiny_bundle, out, "--format", name).exit_code == 0
        assert contents(out, TIMES) == contents(undisturbed / name, TIMES)


@pytest.mark.parametrize("changes", [{"first": 3}, {"file": "../x"}, {"sha256": "0"}, {"check": 1}])
def test_line_of_a_shard_that_lies(tiny_bundle, undisturbed, tmp_path, changes):
    out = tmp_path / "out"
    shutil.copytree(undisturbed / "parquet", out)
    edit_line(out / "shards.jsonl", 1, **changes)
    assert run_here(tiny_bundle, out, "--format", "parquet").exit_code == 0
    assert contents(out, TIMES) == contents(undisturbed / "parquet", TIMES)


def test_counts_of_a_batch_that_lie_are_not_counted(tiny_bundle, undisturbed, unfinished):
    """Neither without a checksum, nor with that of other counts, nor infinite with its own."""
    config, layout = config_of(undisturbed), Layout()
    with open_run(unfinished, config, tiny_bundle, layout) as run:
        good = run.sealed({"images": 4, "seconds": 1.0, "statistics": {}, "calls": {}})
        endless = run.sealed({"images": 4, "seconds": float("inf"), "statistics": {}, "calls": {}})
    lines = [good, good | {"images": 8}, {"images": 4, "seconds": 1.0}, endless]
    journal.append(unfinished / "unfinished.jsonl", lines)
    with open_run(unfinished, config, tiny_bundle, layout) as run:
        assert (run.tally.images, run.tally.seconds) == (4, 1.0)


def test_run_record_holds_the_hashes_of_the_lines(undisturbed):
    for name in ("png", "webdataset", "npz", "parquet"):
        files = json.loads((undisturbed / name / "run.json").read_text())["files"]
        names = ["images.jsonl"] + ["shards.jsonl"] * (name != "png")
        assert files == {
            each: hashlib.sha256((undisturbed / name / each).read_bytes()).hexdigest()
            for each in names
        }


LOST = {
    "lost": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "counts of another kind": lambda path: path.write_text(
        path.read_text().replace('"target_calls": ', '"target_calls": "a", "x": ')
    ),
}


@pytest.mark.parametrize("record", ["run.json", "settings.json"])
@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("name", ["png", "npz"])
def test_lost_record_is_written_again(tiny_bundle, undisturbed, tmp_path, name, case, record):
    out = tmp_path / "out"
    shutil.copytree(undisturbed / name, out)
    LOST[case](out / record)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.[pn][pn][gz]")}
    result = run_here(tiny_bundle, out, "--format", name)
    assert result.exit_code == 0, result.output
    assert contents(out, TIMES) == contents(undisturbed / name, TIMES)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again, first = (json.loads((f / "run.json").read_text()) for f in (out, undisturbed / name))
    same = ("config", "bundle", "files", "images", "distribution")
    assert all(again[key] == first[key] for key in same)


def test_run_of_an_older_version_is_refused_with_what_helps(tiny_bundle, undisturbed, tmp_path):
    """Finished, as it was before settings.json; and unfinished, its settings in the journal."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed / "png", out)
    identity = json.loads((out / "settings.json").read_text())
    (out / "settings.json").unlink()
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"schema": 1}))
    finished = run_here(tiny_bundle, out)
    (out / "run.json").unlink()
    del identity["schema"]
    journal.rewrite(out / "unfinished.jsonl", [identity])
    for result in (finished, run_here(tiny_bundle, out)):
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert "another version of cspd (1, this one writes 2)" in result.stderr
        assert "add --overwrite to make them again" in result.stderr
    assert run_here(tiny_bundle, out, "--overwrite").exit_code == 0
    assert contents(out, TIMES) == contents(undisturbed / "png", TIMES)


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    "name", ["preview/grid.png", "images.jsonl", "run.json", "00003.png", "pending", "preview"]
)
def test_link_in_the_place_of_a_file_is_refused(tiny_bundle, unfinished, tmp_path, name, options):
    mine = tmp_path / "mine"
    if name in ("pending", "preview"):
        mine.mkdir()
        (mine / "00001.png").write_text("mine")
    else:
        mine.write_text("mine")
    path = unfinished / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(mine)
    before = contents(tmp_path)
    result = run_here(tiny_bundle, unfinished, *options)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert str(path) in result.stderr and "remove it" in result.stderr
    assert contents(tmp_path) == before and path.is_symlink()


@pytest.mark.parametrize("name", ["lost+found", ".DS_Store", "Thumbs.db", ".directory", "._x"])
def test_folder_with_what_systems_leave_in_it_is_empty(tiny_bundle, undisturbed, tmp_path, name):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    with open_run(out, config_of(undisturbed), tiny_bundle, Layout()) as run:
        assert len(run.missing) == NUM_IMAGES
    assert sorted(path.name for path in out.iterdir()) == sorted([name, "settings.json"])


def test_names_keep_their_order_beyond_five_digits(tiny_bundle, undisturbed, tmp_path):
    for count, first, last in ((100_000, "00000", "99999"), (100_001, "000000", "100000")):
        config = config_of(undisturbed).model_copy(update={"num_images": count})
        run = RunFolder(tmp_path, config, tiny_bundle, Layout())
        names = [run.image_path(index).name for index in (0, 9_999, 99_999, count - 1)]
        assert (names[0], names[-1]) == (f"{first}.png", f"{last}.png")
        assert names == sorted(names)
    shards = Layout(format="webdataset", shard_size=1).shards(100_001)
    assert [shard.name for shard in shards[::100_000]] == ["000000.tar", "100000.tar"]


TORN = {
    "half a line": b'{"image": 12, "fi',
    "line without its end": b'{"image": 12, "file": "00012.png"}',
    "zeros": b"\0" * 64,
    "zeros and a line's end": b"\0" * 64 + b"\n",
    "no object": b"17\n",
    "foreign object": b'{"image": "x"}\n{"image": 99999, "sha256": ""}\n{}\n',
    "not UTF-8": b"\xff\xfe\n",
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("case", TORN)
@pytest.mark.parametrize("name", ["images.jsonl", "unfinished.jsonl"])
def test_torn_line(tiny_bundle, undisturbed, unfinished, case, name):
    with (unfinished / name).open("ab") as file:
        if name == "unfinished.jsonl":
            # Without any line of a run it would be somebody's own file.
            file.write(b'{"images": 4, "seconds": 1.0}\n')
        file.write(TORN[case])
    with open_run(unfinished, config_of(undisturbed), tiny_bundle, Layout()) as run:
        assert run.missing == list(range(12, NUM_IMAGES))
        whole = journal.repair(unfinished / "images.jsonl")
    assert (unfinished / "images.jsonl").read_bytes() == journal.encode(whole)


def test_line_whose_image_was_never_written(tiny_bundle, undisturbed, unfinished):
    lines = journal.repair(undisturbed / "png" / "images.jsonl")
    journal.append(unfinished / "images.jsonl", lines[12:16])
    shutil.copy(undisturbed / "png" / "00013.png", unfinished)
    shutil.copy(undisturbed / "png" / "00013.png", unfinished / "00014.png")
    layout = Layout()
    with open_run(unfinished, config_of(undisturbed), tiny_bundle, layout) as run:
        assert run.missing == [12, *range(14, NUM_IMAGES)]


def test_batches_are_made_whole_without_reproducible(tiny_bundle, undisturbed, tmp_path):
    config = config_of(undisturbed).model_copy(update={"reproducible": False})
    with open_run(tmp_path / "out", config, tiny_bundle, Layout()) as run:
        run.lines = {index: {} for index in range(NUM_IMAGES) if index not in (5, 22)}
        assert run.missing == [4, 5, 6, 7, 20, 21, 22, 23]
        assert run.state.endswith("22 of 24 images are safe on disk (0..4, 6..21, 23)")


OTHER = {
    "seed": (("--seed", 5), "seed is 0 there, 5 here"),
    "more images": (("--num-images", 48), "num_images is 24 there, 48 here"),
    "format": (("--format", "npz"), "format is png there, npz here"),
    "labels": (("--labels", "2"), "labels is [1, 417] there, [1, 417, 2] here"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_configuration_is_refused(tiny_bundle, unfinished, case):
    options, difference = OTHER[case]
    before = contents(unfinished)
    result = run_here(tiny_bundle, unfinished, *options)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"an unfinished run of another configuration ({difference})" in result.stderr
    assert contents(unfinished) == before


def test_other_version_is_refused(tiny_bundle, undisturbed, unfinished, monkeypatch):
    monkeypatch.setattr("cspd.runtime.store.folder.tool_version", lambda: "99")
    with pytest.raises(CspdError, match=r"tool is 0.* there, 99 here"):
        open_run(unfinished, config_of(undisturbed), tiny_bundle, Layout())


def test_unfinished_run_may_be_overwritten(tiny_bundle, unfinished):
    result = run_here(tiny_bundle, unfinished, "--overwrite", "--num-images", 4)
    assert result.exit_code == 0, result.output
    assert len(journal.repair(unfinished / "images.jsonl")) == 4
    assert len(list(unfinished.glob("0*.png"))) == 4


def test_two_processes_never_share_a_folder(tiny_bundle, undisturbed, unfinished):
    layout = Layout()
    with open_run(unfinished, config_of(undisturbed), tiny_bundle, layout):
        result = run_here(tiny_bundle, unfinished)
        assert result.exit_code == 1 and "another run is writing there" in result.stderr
    assert run_here(tiny_bundle, unfinished).exit_code == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 96 KiB, which holds some of the images."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def remount(disk, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@pytest.mark.parametrize("name", ["png", "webdataset", "npz", "parquet"])
def test_full_disk(tiny_bundle, undisturbed, small_disk, name):
    out = small_disk / "out"
    result = run_here(tiny_bundle, out, "--format", name)
    safe = len(promises(out))
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1 and "No space left on device" in result.stderr
    assert f"{out}: {safe} of 24 images are safe on disk" in result.stderr
    assert 0 < safe <= NUM_IMAGES
    assert not list(out.rglob("*.tmp"))
    remount(small_disk, "size=4m")
    assert run_here(tiny_bundle, out, "--format", name).exit_code == 0
    assert contents(out, TIMES) == contents(undisturbed / name, TIMES)


def test_read_only_folder(tiny_bundle, small_disk, unfinished):
    out = small_disk / "out"
    remount(small_disk, "size=4m")
    shutil.copytree(unfinished, out)
    before = contents(out)
    remount(small_disk, "ro")
    result = run_here(tiny_bundle, out)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "Read-only file system; finished images in it are untouched" in result.stderr
    assert contents(out) == before


def test_file_size_limit(tiny_bundle, undisturbed, tmp_path):
    """The same as a full disk, where nothing can be mounted: images.jsonl reaches its limit."""
    out, (_, hard) = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        result = run_here(tiny_bundle, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    safe = len(promises(out))
    assert 0 < safe < NUM_IMAGES
    assert f"{safe} of 24 images are safe on disk (0..{safe - 1})" in result.stderr
    assert "File too large" in result.stderr
    # What did not fit was taken back: the file ends with a whole line.
    assert (out / "images.jsonl").read_bytes().endswith(b"}\n")
    assert run_here(tiny_bundle, out).exit_code == 0
    assert contents(out, TIMES) == contents(undisturbed / "png", TIMES)


def test_spans():
    assert spans([]) == "" and spans({3}) == "3"
    assert spans([5, 0, 1, 2, 9]) == "0..2, 5, 9"
    assert spans(range(0, 20, 2)) == "0, 2, 4, 6, ..."
