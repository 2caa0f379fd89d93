"""Where weights lie: the authors' layout below a root, and which file of a folder is meant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from cspd.engines.errors import CspdError
from cspd.export.weights.files import WeightFile, read_weights
from cspd.export.weights.shards import is_index, read_shards

# Where the authors' download script and the public safetensors conversion leave their files.
_FOLDER = "pretrained_models"
DEFAULT_PATHS = {
    **{
        preset: (
            f"{_FOLDER}/mar/mar_{size}/checkpoint-last.pth",
            f"{_FOLDER}/mar/mar-{size}.safetensors",
            f"{_FOLDER}/mar-{size}.safetensors",
            f"mar-{size}.safetensors",
        )
        for preset, size in (("mar-b", "base"), ("mar-l", "large"), ("mar-h", "huge"))
    },
    "kl16": (
        f"{_FOLDER}/vae/kl16.ckpt",
        f"{_FOLDER}/vae/kl16.safetensors",
        f"{_FOLDER}/kl16.safetensors",
        "kl16.safetensors",
    ),
}
# Looked for in a folder in this order: the authors' names, then those of `save_pretrained`.
_STEMS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
_COMMON = (*_STEMS, *(f"{stem}.index.json" for stem in _STEMS), "diffusion_pytorch_model.bin")
FOLDER_NAMES = {
    "mar": ("checkpoint-last.pth", *_COMMON, "checkpoint.pth", "model.pth"),
    "vae": ("kl16.ckpt", "kl16.safetensors", *_COMMON, "model.ckpt"),
}
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
ENTRIES_SHOWN = 10


def open_weights(path: Path, network: Literal["mar", "vae"]) -> WeightFile:
    """The weights at `path`: a file, an index of shards, or a folder with one of them.

    Raises CspdError where there are none, or where it is not clear which are meant.
    """
    # Unlike Path.is_dir, os.path.isdir takes a name that is too long.
    if os.path.isdir(path):
        path = _in_folder(path, network)
    return read_shards(path) if is_index(path) else read_weights(path)


def find_default_weights(name: str, root: Path = Path()) -> Path:
    """The file below `root` with the weights of `name` (mar-b, mar-l, mar-h or kl16).

    Raises CspdError that names every path tried.
    """
    if name not in DEFAULT_PATHS:
        raise CspdError(f"{name}: no default place for its weights; name a file")
    paths = [root / path for path in DEFAULT_PATHS[name]]
    for path in paths:
        if path.is_file():
            return path
    option = "--vae" if name == "kl16" else "--target-weights or --draft-weights"
    raise CspdError(
        f"{name}: no weights at {', '.join(map(str, paths))}; name a file with {option}, "
        "or build with --random-weights to try the toolkit without any"
    )


def _in_folder(folder: Path, network: Literal["mar", "vae"]) -> Path:
    """The file of `folder` with a known name, or else the only one that looks like weights."""
    known = FOLDER_NAMES[network]
    for name in known:
        if (folder / name).is_file():
            return folder / name
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CspdError(f"{folder}: cannot be read ({error.strerror})") from error
    files = [path for path in entries if path.suffix in SUFFIXES and path.is_file()]
    if len(files) == 1:
        return files[0]
    names = [path.name + "/" * path.is_dir() for path in entries]
    more = f" and {len(names) - ENTRIES_SHOWN} more" if len(names) > ENTRIES_SHOWN else ""
    raise CspdError(
        f"{folder}: {'several files' if files else 'no file'} to take weights from, none of "
        f"{', '.join(known)}; it holds {', '.join(names[:ENTRIES_SHOWN]) or 'nothing'}{more}; "
        "name one file"
    )
