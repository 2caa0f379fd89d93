"""From the tiny bundle to pixels: batches, backends, broken networks, padding."""

import re

import numpy as np
import pytest
import torch

from cspd.engines.backends import open_session
from cspd.engines.errors import CspdError, NonFiniteError
from cspd.runtime.commands import run
from cspd.runtime.commands.cli import configure
from cspd.runtime.config import make_config
from cspd.runtime.decode.plan import MaskPlan
from cspd.runtime.decode.setup import make_batch
from cspd.runtime.decode.stats import Verdicts
from cspd.runtime.noise import Noise
from cspd.runtime.pipeline import Pipeline
from cspd.runtime.sessions import Sessions

METHODS = {
    "target": {"method": "target"},
    "draft": {"method": "draft"},
    "parallel": {"method": "cspd", "verify": "parallel"},
    "prefix": {"method": "cspd", "verify": "prefix"},
    "lossless": {"method": "lossless", "window": 4},
}


def config(num_images: int = 8, **values):
    defaults = {"num_iter": 6, "head_steps": 10, "cfg": 3.0, "gamma": 4, "batch_size": 8}
    return make_config(**{"labels": (3, 417, 5), "num_images": num_images, **defaults, **values})


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    """`pipeline(backend)`: sessions on one thread, kept for the module."""
    opened = {}

    def get(backend: str = "onnxruntime") -> Pipeline:
        if backend not in opened:
            opened[backend] = Pipeline(Sessions(tiny_bundle, backend, "cpu", 1))
        return opened[backend]

    return get


def images_of(pipeline: Pipeline, settings, indices=None):
    """Generated images by index, and the statistics of every batch."""
    batches = list(pipeline.generate(settings, indices))
    found = {image.index: image for images, _ in batches for image in images}
    return found, [statistics for _, statistics in batches]


def same(a, b) -> bool:
    return a.pixels.tobytes() == b.pixels.tobytes() and a.verdicts == b.verdicts


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_image_does_not_depend_on_its_batch(pipeline, backend, name):
    """Byte-identical pixels, and the same verdicts, alone, in a batch of 3 and of 8."""
    settings = config(**METHODS[name])
    in_eight, _ = images_of(pipeline(backend), settings)
    assert sorted(in_eight) == list(range(8))
    in_three, _ = images_of(pipeline(backend), config(3, **METHODS[name]))
    assert sorted(in_three) == [0, 1, 2]
    for index, image in in_three.items():
        assert same(image, in_eight[index])
    for index in (2, 7):
        alone, _ = images_of(pipeline(backend), settings, [index])
        assert same(alone[index], in_eight[index])
    shuffled, _ = images_of(pipeline(backend), settings, [7, 1, 4])
    assert all(same(image, in_eight[index]) for index, image in shuffled.items())
    assert len({image.pixels.tobytes() for image in in_eight.values()}) == 8


@pytest.mark.parametrize("name", ["target", "prefix"])
def test_latents_do_not_depend_on_the_batch_to_the_last_bit(pipeline, name):
    """Pixels round to 256 levels; the tokens behind them are the sharper test."""
    seen = []
    settings = config(**METHODS[name])

    def tokens(indices):
        seen.clear()
        list(pipeline().generate(settings, indices, lambda canvas, _: seen.append(canvas.tokens)))
        return seen[-1].clone()

    together = tokens(None)
    for index in range(8):
        assert torch.equal(tokens([index])[0], together[index]), index


@pytest.mark.parametrize("name", METHODS)
def test_not_reproducible_differs_by_rounding_only(pipeline, name):
    fixed, _ = images_of(pipeline(), config(3, **METHODS[name]))
    free, _ = images_of(pipeline(), config(3, reproducible=False, **METHODS[name]))
    for index, image in fixed.items():
        distance = np.abs(image.pixels.astype(int) - free[index].pixels.astype(int))
        assert distance.max() <= 1


@pytest.mark.parametrize("name", METHODS)
def test_torch_and_onnxruntime_make_the_same_images(pipeline, name):
    settings = config(**METHODS[name])
    by_ort, _ = images_of(pipeline("onnxruntime"), settings)
    by_torch, _ = images_of(pipeline("torch"), settings)
    for index, image in by_ort.items():
        distance = np.abs(image.pixels.astype(int) - by_torch[index].pixels.astype(int))
        assert distance.max() <= 1
        assert image.verdicts == by_torch[index].verdicts


def test_images_say_something(pipeline):
    """The comparisons above would pass on black images; these are none."""
    for name in METHODS:
        found, _ = images_of(pipeline(), config(**METHODS[name]))
        for image in found.values():
            assert image.pixels.shape == (16, 16, 1) and image.pixels.dtype == np.uint8
            assert image.pixels.std() > 20


def test_seed_label_and_method_matter(pipeline):
    base, _ = images_of(pipeline(), config(1, method="target"))
    for change in ({"seed": 1}, {"labels": (417,)}, {"cfg": 2.0}, {"method": "draft"}):
        other, _ = images_of(pipeline(), config(1, **{"method": "target", **change}))
        assert not same(base[0], other[0]), change


def test_labels_in_turn(pipeline):
    found, _ = images_of(pipeline(), config(5, method="target"))
    assert [found[i].label for i in range(5)] == [3, 417, 5, 3, 417]


@pytest.mark.parametrize("name", ["parallel", "prefix"])
def test_both_fates_occur_and_padding_is_not_counted(pipeline, name):
    """Three images in a batch of eight: statistics are those of the three."""
    found, statistics = images_of(pipeline(), config(3, prefill=0.1, **METHODS[name]))
    verdicts = statistics[0].verdicts
    assert verdicts.accepted > 0 and verdicts.replaced_by_target > 0
    summed = Verdicts()
    for image in found.values():
        summed.add(image.verdicts)
    assert summed == verdicts
    # The target's first step with a tenth of the 16 tokens: one token after the first step.
    assert statistics[0].prefilled == 3
    assert verdicts.proposed - verdicts.discarded == 3 * 15


def test_padding_rows_do_not_leak(pipeline, monkeypatch):
    """Whatever class and noise the padding has, the wanted images are the same."""
    settings = config(3, **METHODS["prefix"])
    expected, _ = images_of(pipeline(), settings)

    def other_padding(manifest, config, images, device):
        batch = make_batch(manifest, config, images, device)
        batch.images[len(images) :] = torch.arange(100, 100 + len(batch) - len(images))
        batch.labels[len(images) :] = 999
        return batch

    monkeypatch.setattr("cspd.runtime.pipeline.make_batch", other_padding)
    changed, _ = images_of(pipeline(), settings)
    assert sorted(changed) == [0, 1, 2]
    assert all(same(changed[index], expected[index]) for index in expected)


class Broken:
    """A session whose `call`-th call returns NaN in the `row`-th entry of one output."""

    def __init__(self, session, output: str, row: int, call: int) -> None:
        self.session, self.spec, self.device = session, session.spec, session.device
        self.output, self.row, self.left = output, row, call

    def __call__(self, **tensors):
        outputs = {name: value.clone() for name, value in self.session(**tensors).items()}
        if self.left == 0:
            outputs[self.output][self.row] = torch.nan
        self.left -= 1
        return outputs


@pytest.fixture
def broken_run(tiny_bundle, tmp_path):
    """Run `config` through the command's code with one broken graph; returns message and folder."""

    def go(settings, broken: str, output: str, row: int, call: int = 0):
        def opener(bundle, label, backend, **options):
            session = open_session(bundle, label, backend, **options)
            return Broken(session, output, row, call) if label == broken else session

        with pytest.raises(NonFiniteError) as caught:
            job = run.Job(run.Machine("cpu", 1), quiet=True, opener=opener)
            run.generate(tiny_bundle, settings, tmp_path / "out", job)
        assert "\n" not in str(caught.value)
        return str(caught.value), tmp_path / "out"

    return go


def saved(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


@pytest.mark.parametrize("role", ["target", "draft"])
def test_nan_in_the_head_names_graph_image_and_step(broken_run, role):
    # The third call of a model alone starts with the tokens of two steps; one row per image and
    # token, and the third step of 16 tokens in 6 steps generates two tokens (11 remain masked).
    settings = config(method=role)
    message, folder = broken_run(settings, f"{role}/denoiser_loop", "sample", 2 * 5, 2)
    assert message.startswith(f"{role} denoiser: NaN or infinity in image 5")
    assert "starts with 3 known tokens" in message
    assert saved(folder) == [] and not (folder / "run.json").exists()


def test_nan_in_the_verification_saves_nothing(broken_run):
    message, folder = broken_run(
        config(**METHODS["parallel"], prefill=0), "target/denoiser_loop", "sample", 0
    )
    assert message.startswith("target denoiser: NaN or infinity in image 0")
    assert "starts with 0 known tokens" in message and saved(folder) == []


def test_nan_in_the_transformer_reaches_no_image(broken_run):
    message, folder = broken_run(config(method="target"), "target/backbone", "z", 3, 1)
    assert re.search(r"target \w+: NaN or infinity in image 3", message)
    assert saved(folder) == []


def test_nan_in_the_decoder_names_it(broken_run):
    message, folder = broken_run(config(method="target"), "decoder", "images", 6)
    assert message.startswith("decoder: images holds NaN or infinity") and "images 0..7" in message
    assert saved(folder) == []


def test_images_of_finished_batches_stay(broken_run):
    """A failure in the second batch: the first one's files are whole, nothing of the second."""
    settings = config(6, method="target", batch_size=3)
    message, folder = broken_run(settings, "decoder", "images", 1, 1)
    assert "images 3..5" in message
    assert saved(folder) == ["00000.png", "00001.png", "00002.png"]
    assert len((folder / "images.jsonl").read_text().splitlines()) == 3


def test_sessions_are_opened_when_needed_and_kept(tiny_bundle):
    pipeline = Pipeline(Sessions(tiny_bundle, "onnxruntime", "cpu", 1))
    list(pipeline.generate(config(2, method="target")))
    assert {label.partition("/")[0] for label in pipeline.sessions.calls} == {"target", "decoder"}
    assert pipeline.sessions.calls["target/backbone"].calls == 6
    assert pipeline.sessions.calls["decoder"].calls == 1
    list(pipeline.generate(config(2, method="target")))
    assert pipeline.sessions.calls["target/backbone"].calls == 12


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"labels": (1000,)}, r"class 1000, expected 0\.\.999"),
        ({"num_iter": 17}, r"--num-iter is 17, expected 1\.\.16"),
        ({"gamma": 17}, r"--gamma is 17, expected 1\.\.16"),
        ({"head_steps": 952}, r"--head-steps is 952, expected 2\.\.951"),
    ],
)
def test_settings_that_the_bundle_cannot_run(pipeline, values, expected):
    with pytest.raises(CspdError, match=expected):
        next(pipeline().generate(config(**values)))


@pytest.mark.parametrize("name", METHODS)
def test_image_does_not_depend_on_the_number_of_threads(pipeline, tiny_bundle, name):
    """With threads, calls are cut into parts that run beside each other."""
    settings = config(**METHODS[name])
    alone, _ = images_of(pipeline(), settings)
    for threads in (2, 3):
        cut, _ = images_of(Pipeline(Sessions(tiny_bundle, threads=threads)), settings)
        for index, image in alone.items():
            difference = image.pixels.astype(int) - cut[index].pixels.astype(int)
            assert np.abs(difference).max() <= 1
            assert image.verdicts == cut[index].verdicts


def test_threads_of_pytorch_are_left_as_they_were(pipeline):
    before = torch.get_num_threads()
    for _ in pipeline().generate(config(num_images=2, num_iter=2)):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_runs_that_take_turns_do_not_disturb_each_other(pipeline):
    """Nothing passes through shared state (D14): two runs, a batch each in turn, as if alone."""
    settings = [config(4, batch_size=2, seed=seed, **METHODS["prefix"]) for seed in (1, 2)]
    alone = [images_of(pipeline(), each)[0] for each in settings]
    turns: list[dict] = [{}, {}]
    for batches in zip(*(pipeline().generate(each) for each in settings), strict=True):
        for found, (images, _) in zip(turns, batches, strict=True):
            found.update({image.index: image for image in images})
    for expected, found in zip(alone, turns, strict=True):
        assert sorted(found) == sorted(expected)
        assert all(same(expected[index], found[index]) for index in expected)


def test_labels_default_to_every_class(tiny_bundle):
    """No label given is not an error (D11)."""
    chosen = configure(tiny_bundle, None, {"num_images": 3})
    assert chosen.labels == tuple(range(tiny_bundle.manifest.geometry.num_classes))


@pytest.mark.parametrize(
    ("images", "batch"), [(1, 1), (2, 2), (8, 8), (9, 5), (10, 5), (17, 6), (1000, 8)]
)
def test_batches_are_filled_evenly(tiny_bundle, images, batch):
    """An image more than 8 does not cost 8; what was asked for is kept."""
    assert configure(tiny_bundle, "0", {"num_images": images}).batch_size == batch
    assert configure(tiny_bundle, "0", {"num_images": images, "batch_size": 3}).batch_size == 3
    assert -(-images // batch) == -(-images // 8)


def test_noise_is_drawn_for_one_step_at_a_time(pipeline, monkeypatch):
    """Not for all tokens of all images up front (D12)."""
    drawn = []
    chain = Noise.chain

    def spy(self, purpose, images, positions, num_steps, channels):
        drawn.append(len(images))
        return chain(self, purpose, images, positions, num_steps, channels)

    monkeypatch.setattr(Noise, "chain", spy)
    settings = config(8, method="target")
    images_of(pipeline(), settings)
    plan = MaskPlan(pipeline().bundle.manifest.geometry.num_tokens, settings.num_iter)
    assert len(drawn) == settings.num_iter
    assert max(drawn) == 8 * plan.widest
