"""Intake of checkpoints: which weights a file holds, for which geometry, and what to warn about.

Geometry is derived from the shapes of the tensors, never from a name or an option.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.export.mar import Mar
from cspd.export.presets import PRESETS, MarConfig
from cspd.export.vae import VaeDecoder
from cspd.export.weight_files import file_sha256, read_weights

KNOWN_FILES = {
    "7e970a33bc90353e2fabe3498ed1f2d194dd8d17cd387665f80b2984dfca538c": "MAR-B of its authors",
    "34ce001bcfffb7af67ec8af1e683a30d7bd45760855ddc7deedc1330f2cfd38f": "KL-16 of MAR's authors",
}
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
PUBLISHED = ("mar-b", "mar-l", "mar-h")
# A preset is told by these; head and classes may differ from it, and then the file decides.
BODY = ("grid", "embed_dim", "encoder_depth", "decoder_depth", "token_dim", "buffer_size")
NAMES_SHOWN = 3
MAX_REPEATED = 1 << 30  # bytes of tensors that a smaller file may stand for, by strides of 0


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one network as stored, memory-mapped: official names, dtype of the file.

    `source` is where in the file they were: "model_ema", "model", "state_dict" (a bare one in a
    pickle) or "safetensors". `known_as` names a file whose `sha256` we know. `warnings` are
    sentences for the user.
    """

    path: Path
    sha256: str
    source: str
    state: Mapping[str, Tensor]
    warnings: tuple[str, ...] = ()
    known_as: str | None = None


@dataclass(frozen=True, kw_only=True)
class MarCheckpoint(Checkpoint):
    """Weights of a MAR model and the geometry that their shapes imply."""

    config: MarConfig


def load_mar(
    path: Path,
    preset: str | None = None,
    *,
    num_heads: int | None = None,
    allow_non_ema: bool = False,
) -> MarCheckpoint:
    """The weights of a MAR model in `path`: .pth, .safetensors, a folder with checkpoint-last.pth.

    With `preset`, anything but that preset's transformer is refused. `num_heads` is only needed
    for a geometry that no preset has. Raises CspdError for everything that is not such a file, and
    for a checkpoint without averaged weights unless `allow_non_ema`.
    """
    # Unlike Path.is_dir, os.path.isdir takes a name that is too long.
    path = path / "checkpoint-last.pth" if os.path.isdir(path) else path
    content, is_safetensors = read_weights(path)
    state, source = _unwrap(content, ("model_ema", "model"), path, is_safetensors)
    if source == "model" and not allow_non_ema:
        raise CspdError(
            f"{path}: holds 'model' but no 'model_ema', the averaged weights that published "
            "figures are made with; use another file, or accept these with --allow-non-ema"
        )
    config, warnings = _checked_config(state, preset, num_heads, path)
    with torch.device("meta"):
        _check_names(state, Mar(config).state_dict(), path)
    warnings += _ema_warnings(path, source, config)
    sha256 = file_sha256(path)
    known = KNOWN_FILES.get(sha256)
    return MarCheckpoint(path, sha256, source, state, warnings, known, config=config)


def load_vae(path: Path) -> Checkpoint:
    """The weights of the KL-16 decoder in `path` (.ckpt, .safetensors), without the encoder's.

    Raises CspdError for everything that is not such a file.
    """
    content, is_safetensors = read_weights(path)
    state, source = _unwrap(content, ("model",), path, is_safetensors)
    state = {n: t for n, t in state.items() if n.startswith(("post_quant_conv.", "decoder."))}
    with torch.device("meta"):
        _check_names(state, VaeDecoder().state_dict(), path)
    sha256 = file_sha256(path)
    return Checkpoint(path, sha256, source, state, known_as=KNOWN_FILES.get(sha256))


def infer_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> MarConfig:
    """The geometry that the shapes of `state` imply.

    Heads leave no trace in the shapes: they are those of the preset with the same transformer, or
    `num_heads`. Raises CspdError if names are missing, shapes are inconsistent, or no preset fits.
    """
    shape = _Shapes(state)
    _, tokens, embed_dim = shape.of("diffusion_pos_embed_learned", 3)
    head_width, token_dim = shape.of("diffloss.net.input_proj.weight", 2)
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise CspdError(
            f"diffusion_pos_embed_learned has {tokens} tokens, expected a square number"
        )
    config = MarConfig(
        grid=grid,
        embed_dim=embed_dim,
        encoder_depth=shape.count("encoder_blocks"),
        decoder_depth=shape.count("decoder_blocks"),
        num_heads=num_heads or 1,
        head_width=head_width,
        head_depth=shape.count("diffloss.net.res_blocks"),
        token_dim=token_dim,
        buffer_size=shape.of("encoder_pos_embed_learned", 3)[1] - tokens,
        num_classes=shape.of("class_emb.weight", 2)[0],
    )
    fitting = [preset for preset in PRESETS.values() if not _differences(config, preset, BODY)]
    if fitting:
        return replace(config, num_heads=num_heads or fitting[0].num_heads)
    if num_heads is None:
        name, found = _nearest(config)
        raise CspdError(f"fits no preset; the nearest, {name}, differs in {found}")
    return config


class _Shapes:
    """Shapes of a state dict by name; a missing name is the user's problem."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of the tensor `name`, which must have `rank` axes."""
        if name not in self._state:
            names = ", ".join(list(self._state)[:NAMES_SHOWN]) or "nothing"
            raise CspdError(f"no weights of a MAR model: {name} is missing (found {names} ...)")
        found = self._state[name].shape
        if len(found) != rank:
            raise CspdError(f"no weights of a MAR model: {name} is {list(found)}, not {rank} axes")
        return tuple(found)

    def count(self, prefix: str) -> int:
        """Number of blocks `prefix`.0, `prefix`.1, ...; one that is missing shows later by name."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({m[1] for name in self._state if (m := pattern.match(name))})


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


def _unwrap(
    content: Any, names: tuple[str, ...], path: Path, is_safetensors: bool
) -> tuple[dict[str, Tensor], str]:
    """The state dict in `content` and its source, the first of `names` that is there."""
    if isinstance(content, Mapping):
        for name in names:
            if _is_state(content.get(name)):
                return _stored(content[name], path), name
        if _is_state(content):
            return _stored(content, path), "safetensors" if is_safetensors else "state_dict"
    found: object = type(content).__name__
    if isinstance(content, Mapping):
        found = [key if isinstance(key, str) else type(key).__name__ for key in content][:8]
    raise CspdError(f"{path}: found {found}, expected one of {list(names)} or tensors by name")


def _stored(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state`, unless its tensors repeat what the file holds until they fill the memory."""
    declared = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    size = path.stat().st_size
    if declared > max(size, MAX_REPEATED):
        raise CspdError(
            f"{path}: declares {declared:,} bytes of tensors in a file of {size:,}; "
            "get the file from its authors"
        )
    return dict(state)


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())
    )


def _checked_config(
    state: Mapping[str, Tensor], preset: str | None, num_heads: int | None, path: Path
) -> tuple[MarConfig, tuple[str, ...]]:
    """Geometry of `state`, and warnings where it departs from `preset`."""
    try:
        config = infer_config(state, num_heads)
    except CspdError as error:
        raise CspdError(f"{path}: {error}") from error
    if preset is None:
        return config, ()
    expected = PRESETS[preset]
    if _differences(config, expected, BODY):
        name, rest = _nearest(config)
        advice = f"they fit {name}: choose that preset" if not rest else "they fit no preset"
        found = _differences(config, expected, BODY)
        raise CspdError(f"{path}: not the weights of {preset} ({found}); {advice}, or another file")
    others = tuple(f.name for f in fields(MarConfig) if f.name not in (*BODY, "num_heads"))
    found = _differences(config, expected, others)
    return config, (
        f"{path.name}: differs from {preset} in {found}; the file decides",
    ) if found else ()


def _differences(config: MarConfig, expected: MarConfig, names: tuple[str, ...]) -> str:
    pairs = [(name, getattr(config, name), getattr(expected, name)) for name in names]
    return ", ".join(f"{name} {got} instead of {want}" for name, got, want in pairs if got != want)


def _nearest(config: MarConfig) -> tuple[str, str]:
    """The preset with the fewest differences in its transformer, and those differences."""
    found = {name: _differences(config, preset, BODY) for name, preset in PRESETS.items()}
    name = min(found, key=lambda name: found[name].count(" instead of "))
    return name, found[name]


def _check_names(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise CspdError unless names and shapes are exactly those of the network."""
    problems = []
    for what, names in (
        ("missing", [name for name in expected if name not in state]),
        ("unexpected", [name for name in state if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            problems.append(f"{what}: {', '.join(names[:NAMES_SHOWN])}{more}")
    for name in expected:
        if name in state and state[name].shape != expected[name].shape:
            got, want = list(state[name].shape), list(expected[name].shape)
            problems.append(f"{name} is {got}, expected {want}")
            break
    odd = [name for name in expected if name in state and not _is_plain(state[name])]
    if odd:
        problems.append(f"{odd[0]} is no dense tensor of floating-point numbers")
    if problems:
        raise CspdError(f"{path}: not the weights of this network; {'; '.join(problems)}")


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers, all of them in the file."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    return dense and tensor.is_floating_point() and tensor.device.type == "cpu"


def _ema_warnings(path: Path, source: str, config: MarConfig) -> tuple[str, ...]:
    """What is known about weights that do not say whether they are averaged."""
    if source == "model":
        return (f"{path.name}: weights without averaging (--allow-non-ema), worse than published",)
    body = [name for name in PUBLISHED if not _differences(config, PRESETS[name], BODY)]
    if source == "model_ema" or not body:
        return ()
    if body == ["mar-b"] and source == "safetensors":
        return (
            f"{path.name}: looks like the public safetensors conversion of MAR-B, going by format "
            "and shapes (its hash is not known to us); that file holds the non-EMA weights (FID "
            "5.56 instead of 2.31). Prefer the authors' checkpoint-last.pth",
        )
    return (f"{path.name}: does not say whether its weights are the averaged ones (EMA)",)
