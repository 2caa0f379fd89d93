"""The diffusion head: a small MLP that predicts noise and variance of a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cspd.export.mar.layers import NORM_EPS, Linear

FREQUENCIES = 256
MAX_PERIOD = 10000.0


def time_features(timestep: Tensor) -> Tensor:
    """Sinusoidal features [..., 256] float32 of diffusion times `timestep` [...] in 0..999."""
    half = FREQUENCIES // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[..., None] * torch.exp(index * (-math.log(MAX_PERIOD) / half))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Embedding of the diffusion time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed times `timestep` [...] to [..., width]."""
        return self.mlp(time_features(timestep))


class ResBlock(nn.Module):
    """Residual MLP block, modulated by shift, scale and gate (adaLN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """One block on `x` [..., w] with its `modulation` [..., 3w]."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Modulated projection to noise and variance channels."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Project `x` [..., w] with `modulation` [..., 2w] to [..., out]."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """MLP with adaptive layer norm (the authors' `SimpleMLPAdaLN`)."""

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = Linear(condition_dim, width)
        self.input_proj = Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)

    def forward(self, x: Tensor, timestep: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted noise and raw variance, each [..., C], of noisy tokens `x` [..., C].

        `timestep` [...] in 0..999, condition `z` [..., D].
        """
        return self.denoise(x, self.modulations(self.time_embed(timestep) + self.cond_embed(z)))

    def modulations(self, embedding: Tensor) -> Tensor:
        """All shifts, scales and gates [..., (3 depth + 2) w] of summed embeddings [..., w].

        They do not depend on the noisy token: 60 % of the head's work can be done before the loop.
        """
        # In one piece: a sum of what was transposed would be multiplied matrix by matrix.
        active = F.silu(embedding).contiguous()
        return torch.cat([layer(active) for layer in self.modulation_layers], dim=-1)

    @property
    def modulation_layers(self) -> list[nn.Linear]:
        """The last layer of every modulation, in the order of the layers that they modulate."""
        owners: list[ResBlock | FinalLayer] = [*self.blocks, self.final_layer]
        layers = [owner.adaLN_modulation[1] for owner in owners]
        return [layer for layer in layers if isinstance(layer, nn.Linear)]

    @property
    def blocks(self) -> list[ResBlock]:
        """The residual blocks."""
        return [block for block in self.res_blocks if isinstance(block, ResBlock)]

    def denoise(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and raw variance, each [..., C], from `x` [..., C] and its `modulation`."""
        width = self.input_proj.out_features
        parts = modulation.split([3 * width] * len(self.res_blocks) + [2 * width], dim=-1)
        x = self.input_proj(x)
        for block, part in zip(self.res_blocks, parts, strict=False):
            x = block(x, part)
        noise, variance = self.final_layer(x, parts[-1]).split(self.token_dim, dim=-1)
        return noise, variance
