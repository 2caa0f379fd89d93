"""The estimated time of a run: the runs it is scaled from, and what it must not promise."""

import pytest

from cspd.engines.bundle import Bundle, open_bundle
from cspd.engines.console.commands import human_seconds
from cspd.export.mar.presets import PRESETS
from cspd.runtime.commands.estimate import MEASURED, image_seconds, operations, rate
from cspd.runtime.config import make_config
from cspd.runtime.settings import configure, shipped_bundle

SHIPPED = open_bundle(shipped_bundle())


def settings(**changes):
    return configure(SHIPPED, None, {"method": "target", **changes})


def test_operations_of_one_layer_by_hand():
    """Two tokens in one step: one block on each side, a head of one block and one step."""
    model = {"embed_dim": 2, "encoder_depth": 1, "decoder_depth": 1, "head_width": 3,
             "head_depth": 1, "token_dim": 4, "buffer_size": 1}  # fmt: skip
    config = make_config(labels=(0,), num_images=1, num_iter=1, head_steps=2, cfg=1.0)
    encoder, decoder = 24 * 4 * 1 + 4 * 2 * 1, 24 * 4 * 2 + 4 * 2 * 4
    head = 2 * (9 * 8 + 3 * (2 + 256 + 12))
    assert operations(model, 1, config) == encoder + decoder + 2 * head
    guided = config.model_copy(update={"cfg": 3.0})
    assert operations(model, 1, guided) == 2 * operations(model, 1, config)


def test_the_measured_runs_are_given_back():
    """docs/evidence: 351 ms per image of the shipped pair on two cores, 137 s of mar-h on one."""
    assert image_seconds(SHIPPED, settings(), "cpu", 2) == pytest.approx(0.351, rel=0.02)
    work = operations(vars(PRESETS["mar-h"]), 256, settings(num_iter=16, head_steps=25))
    assert work / rate(work) == pytest.approx(136.8, rel=0.02)


def test_less_work_takes_less_time():
    usual = image_seconds(SHIPPED, settings(), "cpu", 2)
    for changes in ({"num_iter": 12}, {"head_steps": "50:20"}, {"cfg": 1.0}, {"method": "draft"}):
        assert 0 < image_seconds(SHIPPED, settings(**changes), "cpu", 2) < usual
    assert image_seconds(SHIPPED, settings(), "cpu", 4) == usual / 2
    assert rate(1.0) == pytest.approx(MEASURED[0][1])
    assert rate(1e20) == pytest.approx(MEASURED[1][1])


def test_no_time_for_gpus():
    assert image_seconds(SHIPPED, settings(), "cuda", 0) is None


@pytest.mark.parametrize(
    "sizes", [{}, {"embed_dim": "a"}, {"embed_dim": 10**400}, {"embed_dim": 0}]
)
def test_no_time_where_the_sizes_are_none(sizes):
    """What a manifest says of its model is not checked when a bundle is opened."""
    manifest = SHIPPED.manifest.model_copy(deep=True)
    told = manifest.models["target"].config
    told.update(sizes) if sizes else told.clear()
    assert image_seconds(Bundle(SHIPPED.folder, manifest), settings(), "cpu", 0) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "less than a second"), (90, "90 s"), (150, "2 min"), (6000, "100 min"), (9000, "2 h")],
)
def test_human_seconds(seconds, text):
    assert human_seconds(seconds) == text
