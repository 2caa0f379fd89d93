"""Networks with weights in them, in the precision they are to run in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from cspd.export.mar.layers import Linear
from cspd.export.mar.model import Mar
from cspd.export.mar.presets import MarConfig
from cspd.export.mar.vae import Conv2d, VaeDecoder

Network = TypeVar("Network", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def assemble_mar(config: MarConfig, state: Mapping[str, Tensor], precision: str) -> Mar:
    """The model of `config` with `state`, computing its products in `precision`."""
    with torch.device("meta"):
        model = Mar(config)
    return _assign(model, state, precision)


def assemble_vae(state: Mapping[str, Tensor], precision: str) -> VaeDecoder:
    """The KL-16 decoder with `state`, computing its convolutions in `precision`."""
    with torch.device("meta"):
        model = VaeDecoder()
    return _assign(model, state, precision)


def _assign(model: Network, state: Mapping[str, Tensor], precision: str) -> Network:
    """Give `model`, on the meta device, weights: matrices in `precision`, the rest in float32."""
    low = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, (Linear, Conv2d))
        for part in ("weight", "bias")
    }
    typed = {
        name: tensor.to(DTYPES[precision] if name in low else torch.float32)
        for name, tensor in state.items()
    }
    model.load_state_dict(typed, strict=True, assign=True)
    return model.eval().requires_grad_(False)
