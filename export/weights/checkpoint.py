"""Intake of checkpoints: which weights a file holds, for which geometry, and what to warn about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cspd.engines.errors import CspdError
from cspd.export.mar.diffusers_vae import is_diffusers, latent_diffusion_names
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import MarConfig
from cspd.export.mar.vae import VaeDecoder
from cspd.export.weights.files import WeightFile, few
from cspd.export.weights.folders import open_weights
from cspd.export.weights.geometry import checked_config, published_body
from cspd.export.weights.names import (
    AVERAGED,
    AVERAGED_PREFIXES,
    NamedWeights,
    named_weights,
    unusable_dicts,
)
from cspd.export.weights.values import check_dense, check_values

VAE_PREFIXES = ("first_stage_model.", "vae.")  # of the VAE in a checkpoint of latent diffusion
DECODER = ("post_quant_conv.", "decoder.")
NOT_FINITE = "the file is damaged or its training diverged; get another"
NAMES_ADVICE = "save the network's state_dict under its authors' names, or get their file"
VAE_ADVICE = (
    "the decoder is KL-16 of MAR's authors (kl16.ckpt: 16 latent channels, 16 pixels a latent)"
)


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one network, memory-mapped: official names, dtype of the file, finite.

    `source` is where in the file they were: "model_ema", "model", "state_dict" (a bare one in a
    pickle too) or "safetensors", and after a slash the prefix taken from their names. `warnings`
    are sentences for the user.
    """

    path: Path
    sha256: str
    source: str
    state: Mapping[str, Tensor]
    warnings: tuple[str, ...] = ()


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
    """The weights of a MAR model at `path`: .pth, .safetensors, an index of shards, or a folder.

    With `preset`, anything but that preset's transformer is refused. `num_heads` is only needed
    for a geometry that no preset has. Raises CspdError for everything that is not such a file, for
    numbers that are not finite, and for weights that say that they are not averaged unless
    `allow_non_ema`.
    """
    file = open_weights(path, "mar")
    weights = named_weights(file, AVERAGED_PREFIXES)
    if weights.averaged is False and not allow_non_ema:
        reason = unusable_dicts(file.content, AVERAGED) or "it has no 'model_ema'"
        raise CspdError(
            f"{file.path}: holds '{weights.source}', but {reason}; published figures are made with "
            "averaged weights: use another file, or accept these with --allow-non-ema"
        )
    check_dense(weights.state, file.path)
    config, warnings = checked_config(weights.state, preset, num_heads, file.path)
    with torch.device("meta"):
        _check_tensors(weights.state, Mar(config).state_dict(), file.path, NAMES_ADVICE)
    notes = (*warnings, *_ema_warnings(file, weights, config), *weights.notes)
    notes += _folder_note(path, file)
    return MarCheckpoint(
        file.path, file.sha256(), weights.source, weights.state, notes, config=config
    )


def load_vae(path: Path) -> Checkpoint:
    """The weights of the KL-16 decoder at `path`, without the encoder's.

    Names of latent diffusion and of diffusers are understood. Raises CspdError for everything that
    is not such a file or folder, and for numbers that are not finite.
    """
    file = open_weights(path, "vae")
    weights = named_weights(file, VAE_PREFIXES)
    notes = weights.notes + _folder_note(path, file)
    state = {n: tensor for n, tensor in weights.state.items() if n.startswith(DECODER)}
    check_dense(state, file.path)
    converted = latent_diffusion_names(state)
    if len(converted) < len(state):
        raise CspdError(f"{file.path}: holds a weight under two names; {NAMES_ADVICE}")
    if is_diffusers(state):
        notes += (f"{file.path.name}: diffusers' names, converted to those of kl16.ckpt",)
    with torch.device("meta"):
        _check_tensors(converted, VaeDecoder().state_dict(), file.path, VAE_ADVICE)
    return Checkpoint(file.path, file.sha256(), weights.source, converted, notes)


def _folder_note(path: Path, file: WeightFile) -> tuple[str, ...]:
    return (f"{path}: its {file.path.name} is read",) if file.path != path else ()


def _check_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, advice: str
) -> None:
    """Raise CspdError unless names and shapes are the network's, and all numbers are finite."""
    problems = []
    for what, names in (
        ("missing", [name for name in expected if name not in state]),
        ("unexpected", [name for name in state if name not in expected]),
    ):
        if names:
            problems.append(f"{what}: {few(names)}")
    for name in expected:
        if name in state and state[name].shape != expected[name].shape:
            got, want = list(state[name].shape), list(expected[name].shape)
            problems.append(f"{name} is {got}, expected {want}")
            break
    if problems:
        raise CspdError(f"{path}: not the weights of this network; {'; '.join(problems)}; {advice}")
    check_values(state, path, NOT_FINITE)


def _ema_warnings(file: WeightFile, weights: NamedWeights, config: MarConfig) -> tuple[str, ...]:
    """What is known about weights that do not say whether they are averaged."""
    name = file.path.name
    if weights.averaged is False:
        return (f"{name}: weights without averaging (--allow-non-ema), worse than published",)
    body = published_body(config)
    if weights.averaged or body is None:
        return ()
    if body == "mar-b" and file.form == "safetensors":
        return (
            f"{name}: looks like the public safetensors conversion of MAR-B, going by format "
            "and shapes (its hash is not known to us); that file holds the non-EMA weights (FID "
            "5.56 instead of 2.31). Prefer the authors' checkpoint-last.pth",
        )
    return (f"{name}: does not say whether its weights are the averaged ones (EMA)",)
