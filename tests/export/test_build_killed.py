"""A build that is killed: what stands in its place is whole or absent, what is finished stays."""

import json
import random
import shutil
from pathlib import Path

import pytest
from killed_build import build_with_engines, engine_plan, start_build
from tiny_pair import tiny_plan

from cspd.engines.bundle import open_bundle
from cspd.export import build as build_module
from cspd.export.build import build_bundle

KILLS = 20
MAX_DELAY = 1.0  # seconds; an engine takes about half of one


def seed(built_tiny: tuple[Path, Path], out: Path) -> Path:
    """The staging folder of a build that was killed at its first engine: all but one exported."""
    staging = out.with_name(f".{out.name}.building")
    shutil.copytree(built_tiny[1], staging)
    (staging / "build.key").write_text(engine_plan().key())
    return staging


def finished(staging: Path) -> set[str]:
    """Graphs whose record names an engine."""
    return {
        str(path.relative_to(staging)).removesuffix(".done.json")
        for path in staging.rglob("*.done.json")
        if json.loads(path.read_bytes())["graph"]["engines"]
    }


def made(lines: list[str]) -> set[str]:
    """Graphs that the report says were exported or built."""
    return {
        line.partition(":")[0] for line in lines if "exported in" in line or "engine in" in line
    }


def check_whole(out: Path) -> None:
    """Every file is the manifest's, and every graph has its engine."""
    bundle = open_bundle(out)
    for name in bundle.manifest.files:
        bundle.file(name)
    for graph in bundle.manifest.graphs().values():
        if not graph.spec.engines:
            continue
        engine = graph.engines["tensorrt-rtx"]
        assert bundle.manifest.files[engine.file].sha256 == engine.sha256
    extra = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - set(
        bundle.manifest.files
    )
    assert extra <= {"manifest.json", "build.key"}


@pytest.fixture(scope="module", autouse=True)
def _library():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def engines_in(log: Path) -> int:
    """Engines that the report says were built."""
    return log.read_text().count("engine in")


def test_twenty_kills(built_tiny, tmp_path):
    """Each after some engines and a random part of the next: progress on a slow machine, too."""
    out, log = tmp_path / "bundle", tmp_path / "log"
    staging = seed(built_tiny, out)
    choice, kills, killed_with = random.Random(0), 0, set()
    while kills < KILLS:
        if out.exists():
            check_whole(out)
            shutil.rmtree(out)
            shutil.rmtree(staging, ignore_errors=True)
            seed(built_tiny, out)
        before, log = finished(staging), tmp_path / f"log{kills}"
        log.touch()
        process, engines = start_build(out, log), choice.choice((0, 1, 1, 2))
        while process.is_alive() and engines_in(log) < engines:
            process.join(0.01)
        process.join(choice.uniform(0, MAX_DELAY))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            killed_with.add(len(before))
        else:
            assert process.exitcode == 0
        assert not made(log.read_text().splitlines()) & before
    # The kills fell into different stages of the build.
    assert len(killed_with) > 3
    if not out.exists():
        before = finished(staging)
        log = tmp_path / "last"
        build_with_engines(out, log)
        assert not made(log.read_text().splitlines()) & before
    check_whole(out)
    assert not staging.exists()


def test_killed_before_its_publication(built_tiny, tmp_path, monkeypatch):
    """All graphs are done and the manifest is written: nothing is made again."""
    out = tmp_path / "out"
    shutil.copytree(built_tiny[1], out.with_name(".out.building"))

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            build_bundle(tiny_plan(), out)
    assert not out.exists()
    lines: list[str] = []
    build_bundle(tiny_plan(), out, report=lines.append)
    assert lines == []
    assert open_bundle(out).manifest == open_bundle(built_tiny[0]).manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "build.key").exists()


def test_what_a_library_left_half_written_is_dropped(built_tiny, tmp_path):
    """safetensors writes .tmpXXXXXX beside the file that it was asked for."""
    out = tmp_path / "out"
    shutil.copytree(built_tiny[1], out.with_name(".out.building"))
    for left in ("draft/.tmpHBn4Bd", "target/weights.tmp", "manifest.json.part"):
        (out.with_name(".out.building") / left).write_bytes(b"half")
    build_bundle(tiny_plan(), out)
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {*open_bundle(out).manifest.files, "manifest.json"}


def test_killed_between_the_two_renames(built_tiny, tmp_path):
    """The old bundle lies aside, the new one is finished: it is published, the old one goes."""
    out = tmp_path / "out"
    staging = out.with_name(".out.building")
    shutil.copytree(built_tiny[0], staging)
    (staging / "build.key").write_text(tiny_plan().key())
    (tmp_path / ".out.old.abc").mkdir()
    shutil.copytree(built_tiny[0], tmp_path / ".out.old.abc" / "bundle")
    build_bundle(tiny_plan(), out, overwrite=True)
    assert open_bundle(out).manifest == open_bundle(built_tiny[0]).manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_manifest_without_all_its_files_is_not_published(built_tiny, tmp_path):
    out = tmp_path / "out"
    staging = out.with_name(".out.building")
    shutil.copytree(built_tiny[1], staging)
    shutil.copy(built_tiny[0] / "manifest.json", staging)
    damaged = staging / "draft" / "denoiser.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    lines: list[str] = []
    build_bundle(tiny_plan(), out, report=lines.append)
    assert made(lines) == {"draft/denoiser", "decoder/decoder"}
    assert open_bundle(out).manifest == open_bundle(built_tiny[0]).manifest
