"""Image files: PNG with the settings inside, and the labelled grid."""

from __future__ import annotations

import bisect
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from cspd.engines.atomic import atomic_file
from cspd.engines.errors import CspdError

KEY = "cspd"
GRID_COLUMNS = 8
CELL = 112  # pixels; smaller images are enlarged to this in the grid
CAPTION = 18


def numbered(index: int, count: int, suffix: str) -> str:
    """File name of number `index` of `count`, padded so that names sort as their numbers do.

    At least five digits, so that usual runs have the same names whatever their length.
    """
    return f"{index:0{max(5, len(str(count - 1)))}d}.{suffix}"


def encode_png(pixels: np.ndarray, metadata: dict[str, Any]) -> bytes:
    """The PNG of `pixels` [H, W, C] uint8 with `metadata` as an iTXt chunk."""
    info, file = PngInfo(), io.BytesIO()
    info.add_itxt(KEY, json.dumps(metadata, sort_keys=True, separators=(",", ":")))
    to_pillow(pixels).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def decode_png(png: bytes) -> np.ndarray:
    """Pixels [H, W, C] uint8 of a PNG of ours."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def write_png(path: Path, pixels: np.ndarray, metadata: dict[str, Any]) -> None:
    """Write the PNG of `encode_png`, whole or not at all."""
    try:
        with atomic_file(path) as file:
            file.write(encode_png(pixels, metadata))
    except OSError as error:
        raise CspdError(f"{path}: cannot be written: {error.strerror}") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """The settings stored in a PNG of ours; CspdError if there are none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.info.get(KEY)  # type: ignore[attr-defined]
    except Exception as error:  # on damaged input Pillow raises anything at all
        raise CspdError(f"{path}: cannot be read as PNG: {error}") from None
    if not isinstance(text, str):
        raise CspdError(
            f"{path}: has no '{KEY}' text chunk; only images of cspd-run can be replayed"
        )
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        raise CspdError(f"{path}: its '{KEY}' text chunk is not JSON") from None
    if not isinstance(metadata, dict):
        raise CspdError(f"{path}: its '{KEY}' text chunk is not a JSON object")
    return metadata


def to_pillow(pixels: np.ndarray) -> Image.Image:
    """A Pillow image from [H, W, 1 or 3] uint8."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def grid(images: list[np.ndarray], captions: list[str]) -> Image.Image:
    """All `images` [H, W, C] in rows of eight, each with its caption below."""
    columns = min(GRID_COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    scale = max(1, round(CELL / images[0].shape[0]))
    side = images[0].shape[0] * scale
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + CAPTION + 4) + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = 4 + i % columns * (side + 4), 4 + i // columns * (side + CAPTION + 4)
        sheet.paste(to_pillow(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        centre = (x + side // 2, y + side + CAPTION // 2)
        draw.text(centre, shorten(caption, font, side), fill="black", font=font, anchor="mm")
    return sheet


def shorten(text: str, font: Any, width: int) -> str:
    """`text` cut with an ellipsis so that it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text

    def too_wide(count: int) -> bool:
        return font.getlength(text[:count] + "…") > width

    return text[: max(bisect.bisect(range(len(text)), False, key=too_wide) - 1, 0)] + "…"
