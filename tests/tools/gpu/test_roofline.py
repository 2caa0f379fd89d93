"""Work counted from the files against the sum that the head's shape gives; orders of prediction."""

import re

import pytest
from click.testing import CliRunner

from cspd.engines.errors import CspdError
from cspd.export.mar.presets import PRESETS, MarConfig
from cspd.tools.gpu.roofline import GPUS, Count, Machine, count_graph, head_seconds, main
from cspd.tools.gpu.synthetic_head import SyntheticHead

WIDTH, DEPTH, DIM, TOKEN = 40, 2, 24, 16
AXES = {"rows": 6, "branches": 2, "steps": 10, "tokens": 3}


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    config = MarConfig(4, DIM, 1, 1, 2, head_width=WIDTH, head_depth=DEPTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", config)
        yield SyntheticHead("tiny", tmp_path_factory.mktemp("head"), threads=1)


MODULATION = (3 * DEPTH + 2) * WIDTH * WIDTH
BLOCKS = TOKEN * WIDTH + DEPTH * 2 * WIDTH**2 + WIDTH * 2 * TOKEN
TIME, CONDITION = 256 * WIDTH + WIDTH**2, DIM * WIDTH


@pytest.mark.parametrize(
    ("name", "multiplications", "weights"),
    [
        ("denoiser", 12 * (MODULATION + BLOCKS) + 6 * TIME + 6 * CONDITION,
         MODULATION + BLOCKS + TIME + CONDITION),
        ("denoiser_hoisted", 12 * BLOCKS, BLOCKS),
        ("head_modulation", 60 * MODULATION + 10 * TIME + 6 * CONDITION,
         MODULATION + TIME + CONDITION),
    ],
)  # fmt: skip
def test_counts_are_those_of_the_shape(head, name, multiplications, weights):
    found = count_graph(head.file(name), AXES)
    assert found.flops == 2 * multiplications
    assert found.weights == 4 * weights


def test_time_is_bound_by_the_slower_of_two():
    count = Count(flops=1e9, weights=3e9, activations=1e9, products=10)
    gpu = Machine("m", flops=1e12, bandwidth=1e12, launch=0, width=4, overlaps=True, source="")
    assert gpu.seconds(count) == pytest.approx(4e-3)
    half = Machine("m", flops=1e11, bandwidth=1e12, launch=0, width=2, overlaps=True, source="")
    assert half.seconds(count) == pytest.approx(1e-2)
    cpu = Machine("m", flops=1e12, bandwidth=1e12, launch=1e-5, width=4, overlaps=False, source="")
    assert cpu.seconds(count) == pytest.approx(4e-3 + 1e-3 + 2 * 10 * 1e-5)


def test_predictions_are_ordered(head):
    for machine in GPUS:
        plain = head_seconds(head, machine, 4, None, hoisted=False)
        # A tiny head is bound by launches: speculation makes as many fewer as it makes calls.
        assert head_seconds(head, machine, 4, 8, hoisted=False) == pytest.approx(
            plain * 20.4 / 100, rel=0.1
        )


def test_unknown_shapes_are_an_error(head):
    with pytest.raises(CspdError, match="shape of product"):
        count_graph(head.file("denoiser"), {**AXES, "rows": 0})


def test_predicts_a_published_head():
    """Plain stepping is bound by memory: it reads all weights, in two bytes, at every step."""
    result = CliRunner().invoke(main, ["predict", "--preset", "mar-h"])
    assert result.exit_code == 0, result.output
    config, gpu = PRESETS["mar-h"], GPUS[0]
    width, depth = config.head_width, config.head_depth
    square = (3 * depth + 2) + 2 * depth + 1
    weights = square * width**2 + (3 * TOKEN + 256 + config.embed_dim) * width
    products = 3 * depth + 2 + 2 + 1 + 1
    seconds = 100 * (2 * weights / gpu.bandwidth + 2 * products * gpu.launch)
    row = next(line for line in result.output.splitlines() if re.match(r"plain +\d", line))
    found = [float(number) for number in re.findall(r"\d+\.\d+", row)]
    assert len(found) == len(GPUS)
    assert found[0] == pytest.approx(1000 * seconds, rel=0.03)
