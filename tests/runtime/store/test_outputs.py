"""What a run leaves behind, and making an image again from what is written in it."""

import hashlib
import io
import json
import re
import shutil
from dataclasses import fields
from importlib.metadata import version

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cspd.engines.errors import CspdError
from cspd.runtime.commands.cli import main
from cspd.runtime.commands.replay import padded_to
from cspd.runtime.config import AS_RELEASED, RunConfig, make_config
from cspd.runtime.decode.stats import Verdicts
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.store.distribution import distribution
from cspd.runtime.store.formats import Layout
from cspd.runtime.store.images import CAPTION, grid, read_metadata, shorten, to_pillow, write_png
from cspd.runtime.store.resume import open_run

OPTIONS = (
    "--labels", "goldfish,417", "--num-images", "5", "--gamma", "4", "--batch-size", "4",
    "--num-iter", "6", "--seed", "11", "--threads", "1", "--prefill", "0.1",
)  # fmt: skip
COUNTS = [field.name for field in fields(Verdicts)]


def cspd_run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tiny_bundle, tmp_path_factory):
    """Folder of a run of five images, and what the command printed with --json."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = cspd_run(
        "generate", tiny_bundle.folder, *OPTIONS, "--out", out, "--json", "--baseline"
    )
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def test_files(finished):
    out, _ = finished
    images = [f"{index:05d}.png" for index in range(5)]
    assert sorted(p.name for p in out.iterdir()) == [
        *images,
        "images.jsonl",
        "preview",
        "run.json",
        "settings.json",
    ]
    assert [p.name for p in (out / "preview").iterdir()] == ["grid.png"]


def test_every_png_of_the_folder_is_an_image(finished):
    """As pytorch-fid and torch-fidelity read a folder: all of one size and mode."""
    out, _ = finished
    seen = set()
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            seen.add((image.size, image.mode))
    assert seen == {((16, 16), "L")} and len(list(out.glob("*.png"))) == 5


def test_json_output_is_run_json(finished):
    out, printed = finished
    made = sorted(str(path) for path in out.rglob("*") if path.is_file())
    assert json.loads((out / "run.json").read_text()) | {"made": made} == printed


def test_run_json(finished, tiny_bundle):
    _, record = finished
    assert record["schema"] == 2 and record["tool"] == version("cspd")
    manifest = (tiny_bundle.folder / "manifest.json").read_bytes()
    assert record["bundle"]["sha256"] == hashlib.sha256(manifest).hexdigest()
    assert record["bundle"]["synthetic"] is False
    config = RunConfig.model_validate(record["config"])
    # Options, then the bundle's defaults, then those of the settings.
    assert (config.labels, config.seed, config.gamma) == ((1, 417), 11, 4)
    assert (config.head_steps, config.cfg) == (10, 3.0)
    assert (config.method, config.accept_temperature) == ("cspd", 42.0)
    assert record["distribution"].startswith("approximate")
    assert record["images"] == 5
    assert record["seconds_per_image"] == pytest.approx(record["seconds"] / 5)
    assert {"torch", "python", "cpus", "gpu"} <= set(record["host"])
    assert set(record["graphs"]) >= {"target/backbone", "draft/backbone", "decoder"}
    assert all(graph["calls"] > 0 for graph in record["graphs"].values())
    baseline = record["baseline"]
    assert baseline["speed_ratio"] == pytest.approx(baseline["seconds"] / record["seconds"])


def test_both_sides_of_a_baseline_are_warmed_up(tiny_bundle, tmp_path, monkeypatch):
    made, real = [], Pipeline.generate

    def watched(self, config, indices=None, *rest):
        made.append((config.method, list(indices)))
        return real(self, config, indices, *rest)

    monkeypatch.setattr(Pipeline, "generate", watched)
    quick = ("--num-images", "3", "--batch-size", "2", "--num-iter", "2", "--head-steps", "2")
    arguments = ("generate", tiny_bundle.folder, *quick, "--threads", "1", "--baseline")
    result = cspd_run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert made == [(method, images) for method in ("cspd", "target")
                    for images in ([0, 1], [0, 1, 2])]  # fmt: skip
    # One run each: no second digit.
    assert re.search(r"cspd .* about \d+\.\dx", result.stdout)


def test_statistics_of_run_json_add_up(finished):
    out, record = finished
    statistics = record["statistics"]
    for name in COUNTS:
        assert statistics[name] == sum(line[name] for line in lines_of(out))
        assert statistics[name] == sum(each[name] for each in statistics["rounds"].values())
    judged = statistics["proposed"] - statistics["discarded"]
    assert judged + statistics["prefilled"] == 5 * 16
    assert statistics["acceptance_rate"] == pytest.approx(statistics["accepted"] / judged)
    # Two batches: one prefill step each, and a round for each window.
    assert statistics["target_calls"] == 2 * (1 + len(statistics["rounds"]))
    assert statistics["target_rounds"] == statistics["target_calls"]


def test_images_jsonl(finished):
    out, _ = finished
    lines = lines_of(out)
    assert [line["image"] for line in lines] == list(range(5))
    for line in lines:
        content = (out / line["file"]).read_bytes()
        assert line["sha256"] == hashlib.sha256(content).hexdigest()
        assert line["label"] == (1, 417)[line["image"] % 2]
    assert lines[0]["class"] == "goldfish"


def test_metadata_of_an_image(finished, tiny_bundle):
    out, record = finished
    for line in lines_of(out):
        metadata = read_metadata(out / line["file"])
        assert metadata["schema"] == 2 and metadata["image"] == line["image"]
        assert (metadata["label"], metadata["class"]) == (line["label"], line["class"])
        # Its own label alone: those of the run would be in every image.
        assert metadata["config"] == record["config"] | {"labels": [line["label"]]}
        assert metadata["bundle"] == tiny_bundle.sha256
        assert "synthetic" not in metadata
        with Image.open(out / line["file"]) as image:
            assert image.size == (16, 16) and image.mode == "L"


def test_grid_holds_every_image(finished):
    out, _ = finished
    with Image.open(out / "preview" / "grid.png") as sheet:
        # Five columns; 16 pixels enlarged seven times to 112, and four pixels between.
        assert sheet.size == (5 * (112 + 4) + 4, 112 + CAPTION + 4 + 4)
        pixels = np.asarray(sheet.convert("L"))
    for column in range(5):
        with Image.open(out / f"{column:05d}.png") as image:
            left = 4 + column * 116
            assert (pixels[4:116:7, left : left + 112 : 7] == np.asarray(image)).all()


@pytest.mark.parametrize("index", [0, 3, 4])
def test_replay_is_identical(finished, tiny_bundle, tmp_path, index):
    """Also of image 4, which was alone in its batch with padding."""
    image, again = finished[0] / f"{index:05d}.png", tmp_path / "again.png"
    result = cspd_run("replay", image, tiny_bundle.folder, "--threads", "1", "--out", again)
    assert result.exit_code == 0, result.output
    assert "identical" in result.stdout
    assert again.read_bytes() == image.read_bytes()


def test_an_image_with_all_labels_of_its_run_is_made_again(finished, tiny_bundle, tmp_path):
    """As versions wrote it that had them all in every image."""
    metadata = read_metadata(finished[0] / "00001.png")
    metadata["config"]["labels"] = finished[1]["config"]["labels"]
    with Image.open(finished[0] / "00001.png") as image:
        write_png(tmp_path / "x.png", np.asarray(image)[..., None], metadata)
    result = cspd_run("replay", tmp_path / "x.png", tiny_bundle.folder, "--threads", "1")
    assert result.exit_code == 0 and "identical" in result.stdout, result.output


def test_labels_in_blocks_are_made_again(tiny_bundle, tmp_path):
    options = (*OPTIONS, "--num-images", "4", "--class-balanced", "--out", tmp_path / "out")
    assert cspd_run("generate", tiny_bundle.folder, *options).exit_code == 0
    for index, label in enumerate((1, 1, 417, 417)):
        path = tmp_path / "out" / f"{index:05d}.png"
        assert read_metadata(path)["config"]["labels"] == [label]
    result = cspd_run("replay", path, tiny_bundle.folder, "--threads", "1")
    assert result.exit_code == 0 and "identical" in result.stdout, result.output


def test_replay_notices_a_changed_pixel(finished, tiny_bundle, tmp_path):
    source = finished[0] / "00001.png"
    with Image.open(source) as image:
        pixels = np.array(image)
    pixels[3, 4] ^= 1
    write_png(tmp_path / "changed.png", pixels[..., None], read_metadata(source))
    result = cspd_run("replay", tmp_path / "changed.png", tiny_bundle.folder, "--threads", "1")
    assert result.exit_code == 1 and "the pixels differ" in result.stderr


def test_replay_of_an_image_that_was_encoded_again(finished, tiny_bundle, tmp_path):
    """A palette holds numbers of colours: equal numbers are not equal pixels."""
    source = finished[0] / "00001.png"
    info = PngInfo()
    info.add_itxt("cspd", json.dumps(read_metadata(source)))
    with Image.open(source) as image:
        palette = Image.fromarray(np.asarray(image)).convert("L")
        palette.putpalette([255 - level for level in range(256) for _ in range(3)])
        others = {"P": palette, "RGB": image.convert("RGB"), "LA": image.convert("LA")}
        for mode, other in others.items():
            other.save(tmp_path / "x.png", pnginfo=info)
            result = cspd_run("replay", tmp_path / "x.png", tiny_bundle.folder, "--threads", "1")
            assert result.exit_code == 1 and result.stderr.count("\n") == 1, mode
            assert f"stored as {mode}" in result.stderr and "cspd-run writes L" in result.stderr
        image.save(tmp_path / "x.png", pnginfo=info, transparency=0)
    result = cspd_run("replay", tmp_path / "x.png", tiny_bundle.folder, "--threads", "1")
    assert result.exit_code == 1 and "stored as L with transparency" in result.stderr


@pytest.mark.parametrize("options", [(), ("--verify", "prefix"), ("--method", "lossless")])
def test_replay_needs_no_other_images_of_its_batch(tiny_bundle, tmp_path, options):
    """Padding to 4,096 images is not done: the image of a batch of 16 is that of a batch of two."""
    out, few = tmp_path / "out", ("--num-iter", 2, "--head-steps", 2, "--threads", 1)
    options = (*options, "--window", 4) if "lossless" in options else options
    arguments = ("generate", tiny_bundle.folder, "--labels", "1", "--num-images", 1, *few, *options)
    assert cspd_run(*arguments, "--batch-size", 16, "--out", out).exit_code == 0
    metadata = read_metadata(out / "00000.png")
    metadata["config"]["batch_size"] = 4096
    with Image.open(out / "00000.png") as image:
        write_png(tmp_path / "x.png", np.asarray(image)[..., None], metadata)
    again = tmp_path / "again.png"
    result = cspd_run("replay", tmp_path / "x.png", tiny_bundle.folder, "--out", again)
    assert result.exit_code == 0 and "identical" in result.stdout, result.output
    assert again.read_bytes() == (tmp_path / "x.png").read_bytes()


def test_smaller_batch_speculates_for_the_same_tokens(finished):
    """Calls of `batch_size * p` tokens, p of each image, are speculative up to the same p."""
    for up_to in (0, 5, 8, 30, 64):
        heads = ({"role": "target", "window": 4, "up_to": up_to},)
        config = config_of(finished[1], batch_size=8, heads=heads)
        small = padded_to(config, 2)
        for p in range(1, 17):
            assert (2 * p <= small.heads[0].up_to) == (8 * p <= up_to)
        assert padded_to(config, 8) == config


def png_with(path, text: str | None):
    info = PngInfo()
    if text is not None:
        info.add_itxt("cspd", text)
    Image.new("L", (16, 16)).save(path, pnginfo=info)
    return path


def with_metadata(finished, path, change):
    metadata = read_metadata(finished[0] / "00000.png")
    change(metadata)
    return png_with(path, json.dumps(metadata))


NOT_REPLAYABLE = {
    "foreign PNG": (None, "has no 'cspd' text chunk"),
    "broken JSON": ('{"image": 0', "is not JSON"),
    "JSON list": ("[1, 2]", "not a JSON object"),
    "empty object": ("{}", "was made with bundle"),
    "deep JSON": ("[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("case", NOT_REPLAYABLE)
def test_png_that_cannot_be_replayed(tiny_bundle, tmp_path, case):
    text, fragment = NOT_REPLAYABLE[case]
    check_replay_error(tiny_bundle, png_with(tmp_path / "x.png", text), fragment)


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a"],
    ids=["empty", "text", "head", "gif"],
)
def test_file_that_is_no_png(tiny_bundle, tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    check_replay_error(tiny_bundle, tmp_path / "x.png", "cannot be read as PNG")


def test_truncated_png(finished, tiny_bundle, tmp_path):
    whole = (finished[0] / "00000.png").read_bytes()
    for length in (30, len(whole) // 2):
        (tmp_path / "x.png").write_bytes(whole[:length])
        check_replay_error(tiny_bundle, tmp_path / "x.png", "cannot be read as PNG")


CHANGES = {
    "other bundle": (lambda m: m.update(bundle="0" * 64), "was made with bundle 000000000000"),
    "no settings": (lambda m: m.pop("config"), "its settings are not valid"),
    "wrong settings": (lambda m: m["config"].update(gamma="many"), "its settings are not valid"),
    "unknown setting": (lambda m: m["config"].update(plugin="x"), "its settings are not valid"),
    "no index": (lambda m: m.pop("image"), "its settings are not valid"),
    "text as index": (lambda m: m.update(image="first"), "its settings are not valid"),
    "index too large": (lambda m: m.update(image=5), "image 5, expected 0..4"),
    "negative index": (lambda m: m.update(image=-1), "image -1, expected 0..4"),
    "unknown class": (lambda m: m["config"].update(labels=[1000]), "class 1000, expected 0..999"),
    "unknown backend": (lambda m: m["config"].update(backend="abacus"), "backend 'abacus'"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_image_with_changed_settings(finished, tiny_bundle, tmp_path, case):
    change, fragment = CHANGES[case]
    check_replay_error(tiny_bundle, with_metadata(finished, tmp_path / "x.png", change), fragment)


def check_replay_error(bundle, image, fragment: str) -> None:
    result = cspd_run("replay", image, bundle.folder, "--threads", "1")
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert fragment in result.stderr


RELEASED = ("--as-released", "--gamma", "2", "--num-iter", "6", "--threads", "1")


def test_as_released_is_written_out(tiny_bundle, tmp_path):
    """In run.json and the image stands what the preset means, so that it can be made again."""
    arguments = ("--labels", "1", "--batch-size", "1", "--out", tmp_path / "out", "--json")
    result = cspd_run("generate", tiny_bundle.folder, *RELEASED, *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    config = record["config"]
    assert {name: config[name] for name in AS_RELEASED} == dict(AS_RELEASED)
    assert (config["accept_temperature"], config["residual_temperature"]) == (42, 1)
    assert record["distribution"].endswith(
        "test at 42 and residual at 1 standard deviations: as released"
    )
    # Six steps, the first by the target; then 1 and 2, 3 and 4, 5.
    assert record["statistics"]["target_rounds"] == 1 + 3
    again = cspd_run("replay", tmp_path / "out/00000.png", tiny_bundle.folder, "--threads", "1")
    assert again.exit_code == 0, again.output


NEW = ("residual_temperature", "count_in")


def older(path, to, **changes) -> None:
    """The image `path` as the version before wrote it: without the options that came since."""
    metadata = read_metadata(path)
    settings = {name: value for name, value in metadata["config"].items() if name not in NEW}
    metadata |= {"schema": 1, "config": settings | changes}
    with Image.open(path) as image:
        write_png(to, np.asarray(image)[..., None], metadata)


def test_older_images_are_made_again(finished, tiny_bundle, tmp_path):
    """Their residual had the temperature of the test."""
    arguments = ("--on-reject", "residual", "--residual-temperature", "7", "--out", tmp_path / "r")
    options = (*OPTIONS, "--accept-temperature", "7", "--num-images", "1", *arguments, "--json")
    made = cspd_run("generate", tiny_bundle.folder, *options)
    assert json.loads(made.stdout)["statistics"]["resampled"] > 0
    for source in (finished[0] / "00000.png", tmp_path / "r/00000.png"):
        older(source, tmp_path / "old.png")
        result = cspd_run("replay", tmp_path / "old.png", tiny_bundle.folder, "--threads", "1")
        assert result.exit_code == 0, result.output


OTHERWISE = {
    "temperature": ({"temperature": 0.9}, "sampled otherwise with --temperature 0.9"),
    "chains": ({"align": False, "head": "lossless", "window": 4}, "--no-align with speculative"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_older_images_that_come_out_otherwise_are_refused(finished, tiny_bundle, tmp_path, case):
    changes, fragment = OTHERWISE[case]
    older(finished[0] / "00000.png", tmp_path / "old.png", **changes)
    check_replay_error(tiny_bundle, tmp_path / "old.png", fragment)


def test_replay_to_a_place_that_is_none(finished, tiny_bundle, tmp_path):
    out = tmp_path / "nowhere" / "x.png"
    result = cspd_run("replay", finished[0] / "00000.png", tiny_bundle.folder, "--out", out)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert str(out) in result.stderr and result.stderr.count("\n") == 1


def config_of(record: dict, **changes) -> RunConfig:
    return RunConfig.model_validate(record["config"] | changes)


def test_opening_makes_the_folder(finished, tiny_bundle, tmp_path):
    with open_run(tmp_path / "a" / "b", config_of(finished[1]), tiny_bundle, Layout()) as run:
        assert run.missing == [0, 1, 2, 3, 4] and run.record is None
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["settings.json"]


def test_overwriting_removes_files_of_runs_only(finished, tiny_bundle, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(finished[0], folder)
    mine = ("notes.txt", "photo.png", ".hidden", ".my.12.tmp")
    for name in mine:
        (folder / name).write_text("mine")
    other = config_of(finished[1], seed=12)
    with pytest.raises(CspdError, match=r"seed is 11 there, 12 here.*or add --overwrite"):
        open_run(folder, other, tiny_bundle, Layout())
    assert len(list(folder.iterdir())) == 9 + len(mine)
    with open_run(folder, other, tiny_bundle, Layout(), overwrite=True) as run:
        assert len(run.missing) == 5
    assert sorted(path.name for path in folder.iterdir()) == sorted([*mine, "settings.json"])


def test_folder_of_something_else_is_never_overwritten(finished, tiny_bundle, tmp_path):
    (tmp_path / "00001.png").write_text("a picture of mine")
    with pytest.raises(CspdError, match="holds files that are not a run"):
        open_run(tmp_path, config_of(finished[1]), tiny_bundle, Layout(), overwrite=True)
    assert (tmp_path / "00001.png").read_text() == "a picture of mine"


def test_write_png_leaves_no_temporary_file(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    write_png(tmp_path / "x.png", pixels, {"text": "ä 漢 \n"})
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert read_metadata(tmp_path / "x.png") == {"text": "ä 漢 \n"}
    with Image.open(tmp_path / "x.png") as image:
        assert (np.asarray(image) == pixels).all()


def test_grid_wraps_after_eight_images():
    pixels = np.zeros((112, 112, 3), dtype=np.uint8)
    sheet = grid([pixels] * 9, ["x"] * 9)
    assert sheet.size == (8 * 116 + 4, 2 * (112 + CAPTION + 4) + 4)


def test_captions_are_cut_to_their_width():
    class Font:
        def getlength(self, text: str) -> int:
            return 10 * len(text)

    assert shorten("sneaker", Font(), 70) == "sneaker"
    assert shorten("sneaker", Font(), 69) == "sneak…"
    assert shorten("sneaker", Font(), 10) == shorten("sneaker", Font(), 0) == "…"


def test_a_long_caption_is_measured_a_few_times():
    """10,000 characters, 2^14 at most: bisected in 14 steps, not shortened one by one."""
    measured = []

    class Font:
        def getlength(self, text: str) -> int:
            measured.append(len(text))
            return len(text)

    assert shorten("x" * 10_000, Font(), 112) == "x" * 111 + "…"
    assert len(measured) <= 16


def test_grey_and_colour():
    grey, colour = (to_pillow(np.zeros((2, 2, c), dtype=np.uint8)) for c in (1, 3))
    assert (grey.mode, colour.mode) == ("L", "RGB")
    grey.save(io.BytesIO(), format="PNG")


@pytest.mark.parametrize(
    ("test", "residual", "origin"),
    [(42, 1, "as released"), (1, 1, "as in the paper"), (42, 42, "ours, published nowhere")],
)
def test_law_says_who_published_the_residual(test, residual, origin):
    options = {"accept_temperature": test, "residual_temperature": residual}
    config = make_config(labels=(0,), num_images=1, on_reject="residual", **options)
    words = f"test at {test} and residual at {residual} standard deviations: {origin}"
    assert distribution(config).startswith("approximate") and distribution(config).endswith(words)
