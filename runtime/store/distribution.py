"""Which distribution the images of a run follow, in words: what `run.json` says about a method."""

from __future__ import annotations

from cspd.engines.manifest import Manifest
from cspd.runtime.config import RunConfig
from cspd.runtime.heads.relax import total_variation
from cspd.runtime.heads.steps import HeadSteps

MODEL_STEPS = 100  # of the published models, where a bundle says nothing else


def distribution(config: RunConfig, manifest: Manifest | None = None) -> str:
    """What the images of `config` are samples of; `manifest` tells the model's own head steps."""
    parts = [_base(config), *_losses(config, manifest)]
    return "; ".join(parts)


def is_exact(config: RunConfig) -> bool:
    """Whether the images are samples of the target model, with the steps that `config` gives it."""
    return config.method != "draft" and _base(config).startswith("exact")


def certificate(config: RunConfig) -> str | None:
    """What is guaranteed about relaxed denoising, None for exact denoising."""
    if not config.relax:
        return None
    given_up = total_variation(config.relax)
    return f"each token is within {given_up:g} of the target's in total variation"


def _base(config: RunConfig) -> str:
    if config.method == "cspd":
        test = "approximate: acceptance test on two different paths (see DESIGN.md, What is exact)"
        return test if config.on_reject == "target" else f"{test}, {_residual(config)}"
    name = "draft" if config.method == "draft" else "target"
    if config.relax:
        return f"approximate: relaxed denoising of the {name} model (--relax {config.relax})"
    if not HeadSteps.parse(config.head_steps).constant:
        return f"samples of the {name} model with fewer and fewer denoising steps"
    return f"exact: samples of the {name} model"


def _residual(config: RunConfig) -> str:
    """The temperatures of test and residual, and who published them."""
    test, residual = config.accept_temperature, config.residual_temperature
    published = {(42.0, 1.0): "as released", (1.0, 1.0): "as in the paper"}
    origin = published.get((test, residual), "ours, published nowhere")
    return f"test at {test:g} and residual at {residual:g} standard deviations: {origin}"


def _losses(config: RunConfig, manifest: Manifest | None) -> list[str]:
    """Departures from the model's own number of denoising steps."""
    steps = HeadSteps.parse(config.head_steps)
    own = manifest.defaults.get("head_steps", MODEL_STEPS) if manifest else None
    if not steps.constant:
        return [f"lossy: {steps.first} to {steps.last} denoising steps over the image"]
    if own is not None and steps.value != own:
        return [f"lossy against the model's own {own} denoising steps: {steps.value}"]
    return []
