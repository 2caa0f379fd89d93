"""From the options of `cspd-export build` to a plan: weights, decoder, classes."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from cspd.engines.bundle import open_bundle
from cspd.engines.errors import CspdError
from cspd.engines.manifest import Geometry, Precision, Role
from cspd.engines.schedule import ScheduleSpec
from cspd.engines.trt.options import BuildOptions as EngineOptions
from cspd.export.build import BuildOptions, BundlePlan, Source
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import HEAD_STEPS, PRESETS, PUBLISHED, MarConfig
from cspd.export.mar.vae import VaeDecoder
from cspd.export.weights.checkpoint import load_mar, load_vae
from cspd.export.weights.files import file_sha256, regular_size
from cspd.export.weights.folders import find_default_weights
from cspd.export.weights.random import random_state

# The authors' best guidance with a linear schedule, 256 steps (LTH14/mar, README).
GUIDANCE = {"mar-b": 2.9, "mar-l": 3.0, "mar-h": 3.2}
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
# Chosen on 2,000 samples per setting, see docs/evidence/results.md. The clip belongs to the model:
# it was trained on times up to 950 only.
FASHION_SCHEDULE = ScheduleSpec(clip_timesteps=950)
FASHION_DEFAULTS: dict[str, float | int | str] = {
    "num_iter": 49,
    "head_steps": 100,
    "cfg": 6.0,
    "cfg_schedule": "linear",
}


def mar_plan(
    presets: dict[Role, str],
    weights: dict[Role, Path | None],
    vae: Path | None,
    options: BuildOptions,
    *,
    random_weights: bool,
    allow_non_ema: bool,
    clip_timesteps: int | None,
    warn: Callable[[str], None],
) -> BundlePlan:
    """Plan of a bundle of published MAR models; `presets` and `weights` are by role."""
    for role, preset in presets.items():
        if preset not in PUBLISHED:
            raise CspdError(
                f"{role}: {preset!r:.60} is no size we know; {', '.join(PUBLISHED)} are"
            )
    models: dict[Role, Source] = {}
    for seed, (role, preset) in enumerate(presets.items()):
        if random_weights:
            models[role] = _random_model(preset, seed)
        else:
            models[role] = _loaded_model(preset, weights[role], allow_non_ema, warn)
    config = models["target"].config
    assert config is not None
    if config.token_dim != 16:
        raise CspdError(
            f"target: tokens of {config.token_dim} channels, the KL-16 decoder takes 16"
        )
    names = imagenet_classes()
    if len(names) != config.num_classes:
        names = tuple(f"class {i}" for i in range(config.num_classes))
    return BundlePlan(
        models=models,
        decoder=_decoder(vae, random_weights, warn),
        geometry=Geometry(
            grid=config.grid, token_dim=16, num_classes=config.num_classes,
            image_channels=3, image_size=16 * config.grid,
        ),
        class_names=names,
        schedule=ScheduleSpec(clip_timesteps=clip_timesteps),
        options=options,
        defaults={"num_iter": 64, "head_steps": HEAD_STEPS, "cfg": GUIDANCE[presets["target"]]},
    )  # fmt: skip


def demo_plan(
    folder: Path | None = None,
    precision: Precision = "fp32",
    engines: tuple[EngineOptions, ...] = (),
    hoisted: bool = True,
) -> BundlePlan:
    """Plan of the shipped pair, its weights as they were shipped.

    With `folder`, they are its `target.safetensors` and `draft.safetensors`.
    """
    roles: tuple[Role, ...] = ("target", "draft")
    options = BuildOptions(
        max_batch=64, max_rows=4096, precision=precision, engines=engines, hoisted=hoisted,
        storage="fp16" if precision == "fp32" else None,
    )  # fmt: skip
    return BundlePlan(
        models={role: _demo_model(role, folder) for role in roles},
        decoder=None,
        geometry=Geometry(grid=7, token_dim=16, num_classes=10, image_channels=1, image_size=28),
        class_names=FASHION_CLASSES,
        schedule=FASHION_SCHEDULE,
        options=options,
        defaults=FASHION_DEFAULTS,
    )


def _demo_model(role: Role, folder: Path | None) -> Source:
    preset = f"fashion-{role}"
    config = PRESETS[preset]
    if folder is None:
        shipped = open_bundle(Path(str(importlib.resources.files("cspd.demo_pair") / "bundle")))
        record = shipped.manifest.models[role]
        state = load_file(shipped.file(record.weights))
        return Source(preset, state, record.source, record.source_sha256, config)
    path = folder / f"{role}.safetensors"
    if not os.path.isfile(path):  # unlike Path.is_file, it takes a name that is too long
        raise CspdError(f"{path}: not found; train it with python -m cspd.tools.demo.train")
    return Source(preset, load_file(path), "model_ema", file_sha256(path), config)


def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 ImageNet classes by first WordNet lemma, with a note where two are alike."""
    text = importlib.resources.files("cspd.export").joinpath("imagenet_classes.txt").read_text()
    return tuple(text.splitlines())


def weights_file(name: str, path: Path | None) -> Path:
    """Where the weights of `name` (mar-b, mar-l, mar-h or kl16) are: `path`, or their usual place.

    Raises CspdError where there is nothing.
    """
    if path is None:
        return find_default_weights(name)
    if not os.path.isdir(path):
        regular_size(path)
    return path


def _loaded_model(
    preset: str, path: Path | None, allow_non_ema: bool, warn: Callable[[str], None]
) -> Source:
    loaded = load_mar(weights_file(preset, path), preset, allow_non_ema=allow_non_ema)
    for warning in loaded.warnings:
        warn(warning)
    return Source(preset, loaded.state, loaded.source, loaded.sha256, loaded.config)


def _random_model(preset: str, seed: int) -> Source:
    config: MarConfig = PRESETS[preset]
    with torch.device("meta"):
        module = Mar(config)
    return Source(preset, partial(random_state, module, seed), "random", None, config)


def _decoder(path: Path | None, random_weights: bool, warn: Callable[[str], None]) -> Source:
    if random_weights and path is None:
        with torch.device("meta"):
            module = VaeDecoder()
        return Source("kl16", partial(random_state, module, seed=2), "random")
    loaded = load_vae(weights_file("kl16", path))
    for warning in loaded.warnings:
        warn(warning)
    return Source("kl16", loaded.state, loaded.source, loaded.sha256)
