"""What a call of the Python entry returns: images, and what they are and took."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cspd.engines.errors import CspdError
from cspd.engines.words import speaking
from cspd.runtime import arguments
from cspd.runtime.config import Method, RunConfig
from cspd.runtime.decode.stats import Statistics
from cspd.runtime.store.distribution import is_exact
from cspd.runtime.store.images import grid, write_png


@dataclass(frozen=True)
class Images:
    """Images of one call, in the order of their labels; every list has one entry per image.

    `images` are Pillow images, mode L or RGB. `config` holds every setting of the run; with a list
    of seeds, its `seed` is the first of `seeds`. `distribution` says what the images are samples
    of. `stats` counts calls of the models and drafted tokens, `stats.per_image` those of each
    image. `seconds` is the time of computation, without opening the networks. `notes` say what was
    chosen by measured costs, and what could be faster. `metadata` makes an image again.
    """

    images: list[Image.Image]
    labels: list[int]
    class_names: list[str]
    seeds: list[int]
    config: RunConfig
    distribution: str
    stats: Statistics
    seconds: float
    notes: list[str]
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    def __getitem__(self, index: int) -> Image.Image:
        return self.images[index]

    def __repr__(self) -> str:
        exact = "exact" if self.exact else "not exact"
        return f"<{len(self)} images by {self.method} ({exact}) in {self.seconds:.2f} s>"

    @property
    def method(self) -> Method:
        """The method that made them."""
        return self.config.method

    @property
    def exact(self) -> bool:
        """Whether they are samples of the target model; `distribution` says it in full."""
        return is_exact(self.config)

    @speaking("python")
    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write 00000.png and so on, each with the settings that `cspd-run replay` reads.

        The files are those of `cspd-run generate`, to the byte. Returns their paths. Raises
        CspdError if one of them is there already, or cannot be written.
        """
        folder = arguments.path("folder", folder)
        paths = [folder / f"{index:05d}.png" for index in range(len(self))]
        for path in paths:
            if path.exists():
                raise CspdError(f"{path}: exists already; choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CspdError(f"{folder}: cannot be written: {error.strerror}") from None
        for path, image, metadata in zip(paths, self.images, self.metadata, strict=True):
            write_png(path, np.atleast_3d(np.asarray(image)), metadata)
        return paths

    def grid(self) -> Image.Image:
        """All of them in rows of eight, each above the name of its class."""
        return grid([np.atleast_3d(np.asarray(image)) for image in self.images], self.class_names)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.grid()._repr_png_()
