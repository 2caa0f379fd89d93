"""Fashion-MNIST as tokens: reads the four idx files of Debian's package `dataset-fashion-mnist`."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cspd.engines.errors import CspdError

DATA = Path("/usr/share/datasets/fashion-mnist")
PATCH = 4


def load_images(split: str, folder: Path = DATA) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] float32 in [-1, 1] and labels [N] int64: "train" or "t10k"."""
    files = [folder / f"{split}-{name}" for name in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    images, labels = (_read_idx(file) for file in files)
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1, torch.from_numpy(labels).long()


def to_tokens(images: Tensor) -> Tensor:
    """Patches of `images` [N, 1, 28, 28] as tokens [N, 49, 16]."""
    return F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)


def _read_idx(path: Path) -> np.ndarray:
    packed = path.with_name(path.name + ".gz")
    if not packed.exists():
        raise CspdError(f"{packed} not found; apt-get install dataset-fashion-mnist")
    with gzip.open(packed) as file:
        data = file.read()
    ndim = data[3]
    shape = np.frombuffer(data, ">i4", ndim, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()
