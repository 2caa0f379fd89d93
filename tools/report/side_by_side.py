"""`python -m cspd.tools.report.side_by_side`: finished runs above each other, a row each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cspd.engines.errors import CspdError
from cspd.runtime.store.images import grid, read_metadata

COLUMNS = 8
MARGIN = 110  # pixels for the caption of a row


def row_of(folder: Path) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """The first eight images of a run, [H, W, C] uint8 each, and what they say of themselves."""
    files = sorted(folder.glob("[0-9]*.png"))[:COLUMNS]
    if not files:
        raise CspdError(f"{folder}: has no images; make some with cspd-run generate --out {folder}")
    pixels = [np.atleast_3d(np.asarray(Image.open(file))) for file in files]
    return pixels, [read_metadata(file) for file in files]


def caption(metadata: dict[str, Any]) -> str:
    """The method of an image, with the number of drafted tokens where there are any."""
    config = metadata["config"]
    return f"cspd, gamma {config['gamma']}" if config["method"] == "cspd" else config["method"]


def side_by_side(folders: list[Path]) -> Image.Image:
    """The runs in `folders`, a row each, with the method in front and the class below.

    Raises CspdError unless all show the same classes from the same seeds.
    """
    found = [row_of(folder) for folder in folders]
    for folder, (_, records) in zip(folders, found, strict=True):
        for own, first in zip(records, found[0][1], strict=False):
            for name, value, wanted in (
                ("seed", own["config"]["seed"], first["config"]["seed"]),
                ("class", own["class"], first["class"]),
                ("number of images", len(records), len(found[0][1])),
            ):
                if value != wanted:
                    raise CspdError(
                        f"{folder}: {name} is {value}, expected {wanted} as in {folders[0]}"
                    )
    strips = [grid(pixels, [r["class"] for r in records]) for pixels, records in found]
    sheet = Image.new("RGB", (MARGIN + strips[0].width, sum(s.height for s in strips)), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(14), 0
    for strip, (_, records) in zip(strips, found, strict=True):
        sheet.paste(strip, (MARGIN, top))
        middle = (MARGIN - 8, top + strip.height // 2)
        draw.text(middle, caption(records[0]), fill="black", font=font, anchor="rm")
        top += strip.height
    return sheet


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="PNG to write.")
def main(folders: tuple[Path, ...], out: Path) -> None:
    """Show the runs in FOLDERS above each other: same seeds, same classes."""
    try:
        side_by_side(list(folders)).save(out)
    except CspdError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
