"""`cspd.load` and what it returns: the command line's images, results, seeds, callbacks, errors."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cspd
from cspd.engines.bundle import open_bundle
from cspd.engines.errors import SettingError
from cspd.runtime.commands.cli import main
from cspd.runtime.config import make_config
from cspd.runtime.settings import shipped_bundle
from cspd.runtime.store.distribution import is_exact

QUICK = {"num_iter": 4, "head_steps": 4, "batch_size": 2}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
TOKENS = 49


@pytest.fixture(scope="module")
def pipe():
    return cspd.load(threads=1, quiet=True)


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("method", [("cspd",), ("lossless", 4)])
def test_files_are_those_of_the_command_line_to_the_byte(pipe, tmp_path, method):
    name, *window = method
    extra = {"window": window[0]} if window else {}
    made = pipe(["sneaker", "bag", 0], method=name, seed=3, **extra, **QUICK)
    command = ["generate", "--labels=sneaker,bag,0", f"--method={name}", "--seed=3", *OPTIONS]
    command += [f"--window={w}" for w in window]
    command += ["--threads=1", "--quiet", "--out", str(tmp_path / "cli"), "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "cli" / "run.json").read_text())
    saved = made.save(tmp_path / "python")
    assert [path.name for path in saved] == ["00000.png", "00001.png", "00002.png"]
    for path in saved:
        assert path.read_bytes() == (tmp_path / "cli" / path.name).read_bytes()
    assert made.config.model_dump(mode="json") == record["config"]
    assert made.distribution == record["distribution"]
    assert made.stats.acceptance_rate == record["statistics"]["acceptance_rate"]
    assert made.stats.target_calls == record["statistics"]["target_calls"]


def test_result_says_what_it_is(pipe):
    made = pipe(["sneaker", 8], method="cspd", seed=3, **QUICK)
    assert made.method == "cspd" and not made.exact
    assert made.labels == [7, 8] and made.class_names == ["sneaker", "bag"]
    assert made.seeds == [3, 3]
    assert 0 <= made.stats.acceptance_rate <= 1
    assert len(made.stats.per_image) == len(made) == len(list(made)) == 2
    judged = sum(verdicts.proposed for verdicts in made.stats.per_image)
    assert judged == made.stats.verdicts.proposed > 0
    assert made.seconds > 0
    assert made[0].size == (28, 28) and made[0].mode == "L"
    assert made._repr_png_().startswith(b"\x89PNG")
    assert "2 images by cspd (not exact)" in repr(made)


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({"method": "target"}, True),
        ({"method": "lossless"}, True),
        ({"method": "lossless", "relax": "tv=0.05"}, False),
        ({"method": "target", "head_steps": "50:20"}, False),
        ({"method": "cspd"}, False),
        ({"method": "draft"}, False),
    ],
)
def test_exact_means_samples_of_the_target(settings, exact):
    assert is_exact(make_config(labels=(0,), num_images=1, **settings)) is exact


def test_a_list_of_seeds_gives_one_per_image(pipe):
    """Each image is the one that its seed and label make alone, whatever its batch."""
    labels, seeds = ["sneaker", "bag", "dress"], [5, 2**64 - 1, 7]
    together = pipe(labels, seed=seeds, **QUICK)
    assert together.seeds == seeds
    for label, seed, image, metadata in zip(
        labels, seeds, together.images, together.metadata, strict=True
    ):
        alone = pipe(label, seed=seed, **QUICK)
        assert pixels(alone) == pixels([image])
        assert alone.metadata == [metadata]


def test_one_label_serves_for_all_seeds(pipe):
    made = pipe("sneaker", seed=range(2), **QUICK)
    assert made.labels == [7, 7] and made.seeds == [0, 1]


def test_an_image_of_a_list_of_seeds_can_be_replayed(pipe, tmp_path):
    *_, last = pipe(["bag", "dress"], seed=[5, 6], **QUICK).save(tmp_path)
    done = CliRunner().invoke(main, ["replay", str(last), "--threads=1"])
    assert done.exit_code == 0 and "identical" in done.output


def test_callback_and_preview(pipe):
    """Known tokens rise to all of them; the last preview is the image."""
    seen = []

    def watch(canvas, statistics):
        seen.append((canvas.known[0], statistics.target_calls, pipe.preview(canvas)))

    (image,) = pipe("sneaker", method="target", callback_on_step=watch, **QUICK)
    known = [count for count, _, _ in seen]
    assert known == sorted(set(known)) and known[-1] == TOKENS
    assert [steps for _, steps, _ in seen] == [1, 2, 3, 4]
    assert seen[0][2].size == image.size
    assert pixels([seen[0][2]]) != pixels([image]) == pixels([seen[-1][2]])


def test_what_the_callback_raises_ends_the_run(pipe):
    def stop(canvas, statistics):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        pipe("sneaker", callback_on_step=stop, **QUICK)


WRONG = {
    "num_iter is 64, expected 1..49": {"num_iter": 64},
    "num_iter is 0, expected 1 or more": {"num_iter": 0},
    "gama: there is no such setting; did you mean gamma?": {"gama": 4},
    "cfg is 101, expected 0..100": {"cfg": 101},
    "temperature is 0, expected more than 0, at most 10": {"temperature": 0},
    "batch_size is 'many', expected a whole number, 1..4096": {"batch_size": "many"},
    "method is 'magic', expected one of target, draft, cspd": {"method": "magic"},
    "align is 'x', expected true or false": {"align": "x"},
    "head_steps is 1, expected 2 or more": {"head_steps": 1},
    "relax is 'x', expected tv=0..1": {"relax": "x", "method": "lossless"},
    'changes nothing with method="target": leave it out, or add head="lossless"': {
        "relax": "tv=0.1",
        "method": "target",
    },
    "seed is -1, expected 0..18446744073709551615": {"seed": -1},
    "seed is a list of 2, expected one per image: 3": {"seed": [1, 2], "num_images": 3},
    "seed is 'a', expected a whole number": {"seed": [1, "a"]},
    "seed is an empty list": {"seed": []},
    "backend is an argument of cspd.load": {"backend": "torch"},
    "window is 64, the bundle was built for 1..": {"window": 64, "method": "lossless"},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_speak_python(pipe, message):
    with pytest.raises(cspd.CspdError) as caught:
        pipe("sneaker", **{**QUICK, **WRONG[message]})
    assert message in str(caught.value)
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("sneeker", "labels: no class 'sneeker'; the nearest is 'sneaker'"),
        ([12], "labels: class 12, expected 0..9"),
        ([1.5], "labels: 1.5 is neither the number nor the name of a class"),
        ([True], "labels: True is neither"),
        (None, "labels: None is neither"),
        ([], "labels is (), expected a list, 1 entry or more"),
    ],
)
def test_labels_that_are_none(pipe, labels, message):
    with pytest.raises(cspd.CspdError) as caught:
        pipe(labels, **QUICK)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-iter=64"], "--num-iter is 64, expected 1..49"),
        (["--gamma=0"], "--gamma is 0, expected 1 or more"),
        (
            ["--relax=tv=0.1", "--method=target"],
            "changes nothing with --method target: leave it out, or add --head lossless",
        ),
    ],
)
def test_the_same_errors_speak_options_on_the_command_line(tmp_path, options, message):
    done = CliRunner().invoke(main, ["generate", *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bundle": "nowhere"}, "nowhere: no manifest.json there"),
        ({"backend": "abacus"}, "backend 'abacus' is unknown, expected one of onnxruntime"),
        ({"device": "gpu"}, "device is 'gpu', expected cpu or cuda"),
        ({"threads": -1}, "threads is -1, expected 0..1024"),
    ],
)
def test_load_refuses(arguments, message):
    with pytest.raises(cspd.CspdError) as caught:
        cspd.load(**arguments)
    assert message in str(caught.value)


# Values of a wrong kind, as of whole arguments that were mistaken for another.
STRANGE = {
    "bundle is 5, expected the path of a folder": {"bundle": 5},
    "bundle is b'x', expected the path of a folder": {"bundle": b"x"},
    "backend is 5, expected": {"backend": 5},
    "device is 0, expected cpu or cuda": {"device": 0},
    "device is None, expected cpu or cuda": {"device": None},
    "device is 'cpu:0', expected cpu or cuda": {"device": "cpu:0"},
    "device is 'mps', expected cpu or cuda": {"device": "mps"},
    "device is 'meta', expected cpu or cuda": {"device": torch.device("meta")},
    "device is array([1, 2]), expected cpu or cuda": {"device": np.array([1, 2])},
    "threads is 'all', expected a whole number, 0..1024": {"threads": "all"},
    "threads is 1.5, expected a whole number, 0..1024": {"threads": 1.5},
    "threads is True, expected a whole number, 0..1024": {"threads": True},
    "threads is None, expected a whole number, 0..1024": {"threads": None},
    "quiet is 'no', expected True or False": {"quiet": "no"},
}


@pytest.mark.parametrize("message", STRANGE)
def test_load_names_what_is_of_a_wrong_kind(message):
    with pytest.raises(SettingError) as caught:
        cspd.load(**STRANGE[message])
    assert message in str(caught.value)


CALLS = {
    "callback_on_step is 5, expected a function of two arguments": {"callback_on_step": 5},
    "quiet is 0, expected True or False": {"quiet": 0},
    "seed is '12', expected a whole number, or a list of one per image": {"seed": "12"},
    "seed is True, expected a whole number": {"seed": True},
    "seed is None, expected a whole number": {"seed": None},
    "seed is 1.0, expected a whole number": {"seed": np.array([1, 1.5])},
    "seed is {1}, expected a whole number": {"seed": {1}},
    "labels is b'7', expected numbers or names of classes": {"labels": b"7"},
    "labels is {7: 1}, expected numbers or names of classes": {"labels": {7: 1}},
    "labels: 7.0 is neither the number nor the name": {"labels": torch.tensor([7.0])},
    "labels: [7] is neither the number nor the name": {"labels": np.array([[7]])},
    "labels: True is neither the number nor the name": {"labels": np.array([True])},
}


@pytest.mark.parametrize("message", CALLS)
def test_a_call_names_what_is_of_a_wrong_kind(pipe, message):
    with pytest.raises(SettingError) as caught:
        pipe(**{"labels": 7, **QUICK, **CALLS[message]})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, made, canvas: pipe.preview(made), "canvas is <1 images by"),
        (lambda pipe, made, canvas: pipe.preview(canvas, 2), "row is 2, expected 0..1"),
        (lambda pipe, made, canvas: pipe.preview(canvas, -1), "row is -1, expected 0..1"),
        (lambda pipe, made, canvas: pipe.preview(canvas, 0.0), "row is 0.0, expected a whole"),
        (lambda pipe, made, canvas: made.save(5), "folder is 5, expected the path of a folder"),
    ],
)
def test_what_follows_a_call_names_it_too(pipe, call, message):
    seen = []
    made = pipe("sneaker", callback_on_step=lambda canvas, _: seen.append(canvas), **QUICK)
    with pytest.raises(SettingError) as caught:
        call(pipe, made, seen[0])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "labels",
    [np.array([7, 8]), np.array([7, 8], dtype=np.uint8), torch.tensor([7, 8]),
     torch.tensor([7, 8], dtype=torch.int32), [torch.tensor(7), np.int16(8)], range(7, 9),
     np.array(["sneaker", "bag"]), (label for label in (7, "bag"))],
)  # fmt: skip
def test_labels_of_any_kind_of_list(pipe, labels):
    assert pipe.settings(labels).labels == (7, 8)


def test_one_label_and_seeds_from_arrays(pipe):
    for label in (np.array(7), torch.tensor(7), np.int64(7)):
        assert pipe.settings(label).labels == (7,)
    for seeds in (np.array([3, 4]), torch.tensor([3, 4]), range(3, 5)):
        config = pipe.settings(7, seed=seeds)
        assert (config.seed, config.num_images) == (3, 2)
    assert pipe.settings(7, seed=np.array(5)).seed == pipe.settings(7, seed=torch.tensor(5)).seed
    assert cspd.load(device=torch.device("cpu"), threads=np.int64(1)).networks.device == "cpu"


def test_load_takes_the_path_of_a_bundle():
    """As text; its own defaults hold."""
    opened = cspd.load(str(shipped_bundle()), threads=1)
    manifest = open_bundle(shipped_bundle()).manifest
    settings = opened.settings("sneaker").model_dump()
    assert settings["labels"] == (manifest.class_names.index("sneaker"),)
    assert manifest.defaults.items() <= settings.items()
    assert f"target {manifest.models['target'].preset}" in repr(opened)


def test_save_never_overwrites(pipe, tmp_path):
    made = pipe("sneaker", **QUICK)
    (path,) = made.save(str(tmp_path / "new" / "folder"))
    before = path.read_bytes()
    with pytest.raises(cspd.CspdError, match="exists already; choose another folder"):
        made.save(path.parent)
    assert path.read_bytes() == before


def test_numpy_numbers_are_numbers(pipe):
    plain = pipe([7], seed=3, **QUICK)
    assert pixels(pipe(np.array([7]), seed=np.uint64(3), **QUICK)) == pixels(plain)


def test_progress_is_shown_unless_quiet(pipe, capsys, monkeypatch):
    pipe("sneaker", **QUICK)
    assert capsys.readouterr() == ("", "")
    pipe("sneaker", quiet=False, **QUICK)
    assert capsys.readouterr() == ("", "cspd: 1/1 images\n")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # what rich takes for a terminal
    pipe("sneaker", quiet=False, **QUICK)
    assert "━" in capsys.readouterr().err
