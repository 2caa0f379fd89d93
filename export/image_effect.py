"""What reduced precision does to whole images, measured before a bundle is published.

Images are made by the runtime, which stands beside this folder: it is reached by name, through the
tools that stand above both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from cspd.engines.bundle import Bundle
from cspd.engines.manifest import ImageEffect, Manifest
from cspd.engines.sessions.session import Session, TorchSession
from cspd.export.graphs.denoiser import DenoiserGraph, PixelDecoder
from cspd.export.graphs.denoiser_loop import DenoiserLoopGraph
from cspd.export.graphs.networks import FIRST
from cspd.export.mar.assemble import assemble_mar, assemble_vae
from cspd.export.mar.presets import MarConfig

TOOL = "cspd.tools.parity.image_effect"
Weights = Callable[[], Mapping[str, Tensor]]


def with_image_effects(
    bundle: Bundle, models: Mapping[str, Weights], decoder: Weights | None
) -> Manifest:
    """The manifest of `bundle` with the effect of its precision on an image of every model.

    `models` and `decoder` give the original weights, in float32; a pixel decoder has none.
    """
    measure: Callable[..., ImageEffect] = importlib.import_module(TOOL).measure_image_effect
    records = {
        role: record.model_copy(
            update={
                "image_effect": measure(
                    bundle, role, partial(exact_sessions, bundle, role, models[role], decoder)
                )
            }
        )
        for role, record in bundle.manifest.models.items()
    }
    return bundle.manifest.model_copy(update={"models": records})


def exact_sessions(
    bundle: Bundle, role: str, weights: Weights, decoder: Weights | None
) -> dict[str, Session]:
    """PyTorch in float32 for the graphs of `bundle` that plain sampling of `role` calls."""
    manifest = bundle.manifest
    config = MarConfig(**manifest.models[role].config)  # type: ignore[index]
    model = assemble_mar(config, weights(), "fp32")
    pixels: nn.Module = PixelDecoder(manifest.geometry.image_size // manifest.geometry.grid)
    if decoder is not None:
        pixels = assemble_vae(decoder(), "fp32")
    step = DenoiserGraph(model.diffloss)
    modules = {
        f"{role}/backbone": model, f"{role}/denoiser": step, f"{role}/{FIRST}": step,
        f"{role}/denoiser_loop": DenoiserLoopGraph(model.diffloss), "decoder": pixels,
    }  # fmt: skip
    cpu = torch.device("cpu")
    return {
        label: TorchSession(bundle.graph(label).spec, module, cpu)
        for label, module in modules.items()
        if label in manifest.graphs()
    }
