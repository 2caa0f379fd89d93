"""The geometry of a MAR model as the shapes of its tensors imply it, never a name or an option."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.export.mar.presets import PRESETS, MarConfig
from cspd.export.weights.files import few

PUBLISHED = ("mar-b", "mar-l", "mar-h")
# A preset is told by these; head and classes may differ from it, and then the file decides.
BODY = ("grid", "embed_dim", "encoder_depth", "decoder_depth", "token_dim", "buffer_size")
MAX_BLOCKS = 256  # of one kind; mar-h has 20


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


def checked_config(
    state: Mapping[str, Tensor], preset: str | None, num_heads: int | None, path: Path
) -> tuple[MarConfig, tuple[str, ...]]:
    """Geometry of `state`, and warnings where it departs from `preset`.

    Raises CspdError if it fits no network, or another one than `preset`.
    """
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


def published_body(config: MarConfig) -> str | None:
    """The published model with the transformer of `config`, if any."""
    return next((name for name in PUBLISHED if not _differences(config, PRESETS[name], BODY)), None)


class _Shapes:
    """Shapes of a state dict by name; a missing name is the user's problem."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of the tensor `name`, which must have `rank` axes."""
        if name not in self._state:
            names = few(self._state) or "nothing"
            raise CspdError(
                f"no weights of a MAR model: {name} is missing (found {names}); save the network's "
                "state_dict under its authors' names, or get their file"
            )
        found = self._state[name].shape
        if len(found) != rank:
            raise CspdError(f"no weights of a MAR model: {name} is {list(found)}, not {rank} axes")
        return tuple(found)

    def count(self, prefix: str) -> int:
        """Number of blocks `prefix`.0, `prefix`.1, ...; one that is missing shows later by name."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        found = len({m[1] for name in self._state if (m := pattern.match(name))})
        if found > MAX_BLOCKS:
            raise CspdError(f"no weights of a MAR model: {found:,} {prefix}, at most {MAX_BLOCKS}")
        return found


def _differences(config: MarConfig, expected: MarConfig, names: tuple[str, ...]) -> str:
    pairs = [(name, getattr(config, name), getattr(expected, name)) for name in names]
    return ", ".join(f"{name} {got} instead of {want}" for name, got, want in pairs if got != want)


def _nearest(config: MarConfig) -> tuple[str, str]:
    """The preset with the fewest differences in its transformer, and those differences."""
    found = {name: _differences(config, preset, BODY) for name, preset in PRESETS.items()}
    name = min(found, key=lambda name: found[name].count(" instead of "))
    return name, found[name]
