"""The KL-16 VAE decoder with the state_dict of the authors' checkpoint (`kl16.ckpt`).

The convolutional decoder of latent diffusion (Rombach et al. 2022) as MAR configures it: 16 latent
channels, no attention but in the middle, 16 pixels per latent. Precision as in `layers`:
products run in the dtype of their weights; residuals, norm statistics and softmax stay in float32.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

LATENT_SCALE = 0.2325  # latents of the model are scaled to unit variance by this (MAR, main_mar.py)
LATENT_CHANNELS = 16
BASE_CHANNELS = 128
MULTIPLIERS = (1, 1, 2, 2, 4)
BLOCKS_PER_LEVEL = 3
GROUPS = 32
NORM_EPS = 1e-6


class Conv2d(nn.Conv2d):
    """Convolution with same-size padding in the dtype of its weight; returns float32."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, in, h, w] to [B, out, h, w] float32."""
        return super().forward(x.to(self.weight.dtype)).float()


class GroupNorm(nn.GroupNorm):
    """Group norm over 32 groups, always in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [B, c, h, w]."""
        return F.group_norm(x, GROUPS, self.weight.float(), self.bias.float(), self.eps)


class ResnetBlock(nn.Module):
    """Two normalised convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(inputs), Conv2d(inputs, outputs, 3)
        self.norm2, self.conv2 = GroupNorm(outputs), Conv2d(outputs, outputs, 3)
        if inputs != outputs:
            self.nin_shortcut = Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, in, h, w] to [B, out, h, w]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels of a small map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v = (Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, c, h, w] to the same shape."""
        dtype = self.proj_out.weight.dtype
        normed = self.norm(x)
        # Scaling before the product keeps half-precision logits far from overflow.
        query = (self.q(normed) * x.shape[1] ** -0.5).flatten(2).to(dtype)
        key, value = (layer(normed).flatten(2).to(dtype) for layer in (self.k, self.v))
        weights = (query.transpose(1, 2) @ key).float().softmax(-1)
        mixed = value @ weights.to(dtype).transpose(1, 2)
        return x + self.proj_out(mixed.unflatten(2, tuple(x.shape[2:])))


class Upsample(nn.Module):
    """Nearest-neighbour doubling followed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, c, h, w] to [B, c, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual blocks and attention at the resolution of the latents."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, c, h, w] to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, then doubling unless it is the last."""

    def __init__(self, inputs: int, outputs: int, last: bool) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * (BLOCKS_PER_LEVEL - 1)
        self.block = nn.ModuleList(ResnetBlock(width, outputs) for width in widths)
        if not last:
            self.upsample = Upsample(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, in, h, w] to [B, out, 2h, 2w], or [B, out, h, w] on the last level."""
        for block in self.block:
            x = block(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Decoder(nn.Module):
    """Latents to image; `up` counts its levels from the image, so it runs backwards."""

    def __init__(self) -> None:
        super().__init__()
        widths = [BASE_CHANNELS * multiplier for multiplier in MULTIPLIERS]
        self.conv_in = Conv2d(LATENT_CHANNELS, widths[-1], 3)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(inputs, outputs, last=level == 0)
            for level, (inputs, outputs) in enumerate(
                zip([*widths[1:], widths[-1]], widths, strict=True)
            )
        )
        self.norm_out, self.conv_out = GroupNorm(widths[0]), Conv2d(widths[0], 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [B, 16, h, w] to [B, 3, 16h, 16w]."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VaeDecoder(nn.Module):
    """Images from the latents that a MAR model samples."""

    def __init__(self) -> None:
        super().__init__()
        self.post_quant_conv = Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder()

    def forward(self, latents: Tensor) -> Tensor:
        """Images [B, 3, 16h, 16w] float32, about [-1, 1] and not clamped.

        `latents` [B, 16, h, w] float32 as sampled (unit variance): the division by 0.2325 is done
        here.
        """
        return self.decoder(self.post_quant_conv(latents / LATENT_SCALE))
