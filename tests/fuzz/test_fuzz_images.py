"""Images and records nobody vouches for: what `replay` and `report` read."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from harness import budget, check, run_case, run_command, run_here
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import Edit, apply, damaged, edits
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cspd.engines.bundle import open_bundle
from cspd.runtime.commands.cli import main, shipped_bundle
from cspd.runtime.config import make_config
from cspd.runtime.decode.stats import Verdicts
from cspd.runtime.pipeline import GeneratedImage, Pipeline
from cspd.runtime.sessions import Sessions
from cspd.runtime.store.images import KEY, read_metadata
from cspd.runtime.store.outputs import image_metadata

BUNDLE = open_bundle(shipped_bundle())
CONFIG = make_config(
    labels=[3, 1], num_images=2, method="target", num_iter=2, head_steps=3, batch_size=1
)
METADATA = image_metadata(
    CONFIG, BUNDLE, GeneratedImage(1, 1, np.zeros((28, 28, 1), np.uint8), Verdicts())
)


def png(text: str, size: int = 28) -> bytes:
    """A PNG with `text` where ours keep their settings."""
    info, out = PngInfo(), io.BytesIO()
    info.add_itxt(KEY, text)
    Image.new("L", (size, size)).save(out, format="PNG", pnginfo=info)
    return out.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def bomb(width: int, height: int, text: bytes = b"", packed: bytes = b"") -> bytes:
    """A PNG that declares `width` x `height` pixels and holds what `packed` holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), text, chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def packed_text(size: int) -> bytes:
    """A compressed text chunk of ours that unpacks to `size` bytes."""
    return chunk(b"iTXt", KEY.encode() + b"\0\1\0\0\0" + zlib.compress(b" " * size))


GOOD = png(json.dumps(METADATA))
ZEROS = zlib.compress(bytes(32 << 20), 9)


def read(arena, content: bytes) -> None:
    path = arena.fresh() / "image.png"
    path.write_bytes(content)
    check(run_here("image: read", lambda: read_metadata(path), path.parent))


@budget(full=1500, ci=20)
@given(content=st.one_of(damaged(GOOD), st.binary(max_size=100)))
@example(content=bomb(100_000, 100_000))
@example(content=bomb(2**31 - 1, 2**31 - 1))
@example(content=bomb(60_000, 60_000, packed=ZEROS))
@example(content=bomb(28, 28, packed_text(1 << 30)))
@example(content=bomb(28, 28, packed_text(60 << 20) * 4))
@example(content=GOOD[:60])
def test_read(arena, content):
    read(arena, content)


@budget(full=400, ci=12)
@given(
    kind=st.sampled_from([b"IHDR", b"PLTE", b"IDAT", b"iTXt", b"zTXt", b"tEXt", b"iCCP", b"acTL",
                          b"fcTL", b"fdAT", b"tRNS", b"eXIf", b"pHYs", b"gAMA"]),
    content=st.binary(max_size=64), place=st.sampled_from([8, 33]),
)  # fmt: skip
def test_chunks_with_sound_checksums(arena, kind, content, place):
    read(arena, GOOD[:place] + chunk(kind, content) + GOOD[place:])


def replay(arena, content: bytes) -> str:
    path = arena.fresh() / "image.png"
    path.write_bytes(content)
    call = run_command(main, ["replay", str(path), "--threads", "1"])
    return check(run_case("image: replay", call, path.parent)).text


# Settings of an honest image may ask for hours of work; these mutations leave such numbers out.
SLOW = ("num_iter", "head_steps", "window", "gamma")


@budget(full=60, ci=10)
@given(changes=edits(METADATA))
@example(changes=[Edit(("image",), float("inf"))])
@example(changes=[Edit(("image",), True)])
@example(changes=[Edit(("image",), "1")])
@example(changes=[Edit(("image",), 10**4000)])
@example(changes=[Edit(("bundle",), "a\nb\x1b[31m")])
@example(changes=[Edit(("config", "batch_size"), 2**40)])
@example(changes=[Edit(("config", "num_images"), 2**32)])
@example(changes=[Edit(("config", "labels"), [10**30])])
@example(changes=[Edit(("config", "backend"), "../../etc/passwd")])
@example(changes=[Edit(("config",), [1])])
def test_replay(arena, changes):
    changes = [edit for edit in changes if edit.path[-1:] not in [(name,) for name in SLOW]]
    replay(arena, png(apply(METADATA, changes).decode()))


@budget(full=30, ci=6)
@given(text=st.text(max_size=200))
@example(text="[" * 100_000)
@example(text='{"config": ' * 10_000)
@example(text="1" * 5000)
def test_replay_of_other_text(arena, text):
    try:
        content = png(text)
    except UnicodeEncodeError:
        content = png(json.dumps(text))
    assert "Error" in replay(arena, content)


def test_the_untouched_image_is_read_and_replayed(arena):
    """The case above is sound: an image really made with these settings comes out the same."""
    from cspd.runtime.store.images import write_png

    path = arena.fresh() / "image.png"
    images, _ = next(Pipeline(Sessions(BUNDLE, threads=1)).generate(CONFIG, [1]))
    write_png(path, images[0].pixels, image_metadata(CONFIG, BUNDLE, images[0]))
    call = run_command(main, ["replay", str(path), "--threads", "1"])
    assert run_case("image: replay", call, path.parent).kind == "ok"


COUNTS = {
    "proposed": 4, "accepted": 2, "resampled": 1, "replaced_by_target": 0, "fallback": 1,
    "discarded": 0,
}  # fmt: skip
RECORD = {
    "schema": 2, "tool": "0.1.0", "bundle": {"sha256": BUNDLE.sha256, "synthetic": False},
    "distribution": "exact", "config": CONFIG.model_dump(mode="json"), "images": 2, "seconds": 1.5,
    "seconds_per_image": 0.75,
    "statistics": {
        **COUNTS, "acceptance_rate": 0.5, "mean_distance": 0.1, "prefilled": 2,
        "target_rounds": 2, "target_calls": 2, "draft_calls": 2, "rounds": {"2": COUNTS},
    },
    "graphs": {"decoder": {"calls": 1, "seconds": 0.1}}, "host": {"python": "3.11"},
}  # fmt: skip


@budget(full=400, ci=6)
@given(changes=edits(RECORD))
def test_report_on_run_records(arena, changes):
    report(arena, apply(RECORD, changes))


@budget(full=150, ci=4)
@given(content=st.one_of(damaged(json.dumps(RECORD).encode()), st.binary(max_size=100)))
@example(content=b"[" * 100_000)
@example(content=json.dumps(RECORD | {"distribution": "\ud800"}).encode())
@example(content=json.dumps(RECORD | {"bundle": {"sha256": -6.7, "synthetic": False}}).encode())
def test_report_on_other_bytes(arena, content):
    report(arena, content)


def report(arena, content: bytes) -> None:
    folder = arena.fresh() / "run"
    folder.mkdir()
    (folder / "run.json").write_bytes(content)
    Image.new("L", (8, 8)).save(folder / "grid.png")
    call = run_command(main, ["report", str(folder), "--out", str(folder.parent / "report.html")])
    check(run_here("run.json: report", call, folder.parent))


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory):
    """Fonts, templates and lazy imports are ready before the first child is forked."""
    from click.testing import CliRunner

    folder = tmp_path_factory.mktemp("warm")
    (folder / "run.json").write_text(json.dumps(RECORD))
    Image.new("L", (8, 8)).save(folder / "grid.png")
    done = CliRunner().invoke(main, ["report", str(folder), "--out", str(folder / "r.html")])
    assert done.exit_code == 0, done.output
