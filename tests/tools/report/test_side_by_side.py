"""Runs above each other: one picture, refused unless they show the same."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cspd.runtime.store.images import write_png
from cspd.tools.report.side_by_side import MARGIN, main


@pytest.fixture
def runs(tmp_path):
    """Three images of a white target, of a grey cspd and of another seed."""
    for name, method, seed, value in (
        ("target", "target", 3, 255), ("cspd", "cspd", 3, 128), ("other", "cspd", 4, 0),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        for index, shown in enumerate(("bag", "boot", "coat")):
            settings = {"method": method, "seed": seed, "gamma": 8}
            pixels = np.full((28, 28, 1), value, np.uint8)
            write_png(
                tmp_path / name / f"{index:05d}.png", pixels, {"class": shown, "config": settings}
            )
    return tmp_path


def test_a_row_per_run(runs):
    result = CliRunner().invoke(
        main, [str(runs / "target"), str(runs / "cspd"), "--out", str(runs / "made.png")]
    )
    assert result.exit_code == 0, result.output
    sheet = np.asarray(Image.open(runs / "made.png"))
    half = sheet.shape[0] // 2
    # Inside the first image of each row, below the margin of the grid.
    assert (sheet[20, MARGIN + 20] == 255).all() and (sheet[half + 20, MARGIN + 20] == 128).all()
    # A caption stands in front of each row.
    assert sheet[:half, :MARGIN].min() < 128 and sheet[half:, :MARGIN].min() < 128


@pytest.mark.parametrize(
    ("second", "message"), [("other", "seed is 4, expected 3 as in"), ("none", "has no images")]
)
def test_what_cannot_be_compared_is_refused(runs, second, message):
    arguments = [str(runs / "target"), str(runs / second), "--out", str(runs / "made.png")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and message in result.output
    assert not (runs / "made.png").exists()
