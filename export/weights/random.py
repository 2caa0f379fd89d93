"""Random weights for trying the toolkit at full size without any checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMBEDDING_STD = 0.02
HEAD_GAIN = 0.01  # of the modulations: how much condition and time matter
INPUT_GAIN = 0.02  # of the head's input against its bias: samples up to about 1 / gain stay linear
VARIANCE_GAIN = 0.1  # of the raw variances: small ones lie between the bounds of the schedule


def random_state(
    module: nn.Module, seed: int, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Random weights on `device` for every tensor of `module` (which may be on the meta device).

    Matrices keep the variance of their input, norms are the identity, embeddings are small; the
    diffusion head of a MAR model of a published size predicts about its own input as noise, which
    keeps samples near unit size where a purely random one multiplies them by 20,000. Peak memory is
    the result itself and one tensor.
    """
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, tensor in module.state_dict().items():
        state[name] = _random_tensor(name, tensor.shape, generator).to(dtype)
    if "diffloss.net.input_proj.weight" in state:
        _tame_head(state)
    return state


def _random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        value = float(name.endswith("weight"))
        return torch.full(shape, value, device=generator.device)
    values = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith(("class_emb.weight", "pos_embed_learned", "fake_latent", "mask_token")):
        return values.mul_(EMBEDDING_STD)
    gain = HEAD_GAIN if "adaLN_modulation" in name else 1.0
    return values.mul_(gain / shape[1:].numel() ** 0.5)


def _tame_head(state: dict[str, Tensor]) -> None:
    """Make the noise that the head predicts about equal to its input.

    A bias that outweighs the projected input, and is orthogonal to it, keeps the layer norm of the
    last layer nearly linear in the input; that layer is the inverse of the first.
    """
    net = "diffloss.net."
    project, last = (state[net + f"{name}.weight"] for name in ("input_proj", "final_layer.linear"))
    # Zero mean over the width: what the layer norm subtracts is then none of the input.
    weight = (project.float() - project.float().mean(0)) * INPUT_GAIN
    inverse = torch.linalg.pinv(weight)
    signs = 1.0 - 2.0 * (torch.arange(len(weight), device=weight.device) % 2)
    last.mul_(VARIANCE_GAIN)[: len(inverse)] = inverse.to(last.dtype)
    project.copy_(weight)
    state[net + "input_proj.bias"].copy_(signs - weight @ (inverse @ signs))
