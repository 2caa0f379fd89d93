"""Maximal coupling of two diagonal Gaussians: accept a draft or repair it; the distribution stays.

Tensors and random numbers in, tensors out. A drafted value is kept with the probability
min(1, p / q) and otherwise replaced by a draw from the residual (p - q)+, which leaves exactly p
whatever q is. (Maximal coupling; as speculative sampling of diffusion chains: De Bortoli et al.
2025, arXiv 2501.05370. There the variances are equal; here each kernel has its own.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_NORMAL = 1 / math.sqrt(2 * math.pi)  # mean of the positive part of a standard normal number


@dataclass(frozen=True)
class Gaussian:
    """One denoising step as a Gaussian with diagonal covariance, each field [..., C] float32.

    `std` includes the sampling temperature. `log_std` does not: both kernels of a comparison have
    the same temperature, so that it cancels in every ratio.
    """

    mean: Tensor
    log_std: Tensor
    std: Tensor

    @classmethod
    def kernel(cls, mean: Tensor, log_std: Tensor, temperature: Tensor) -> Gaussian:
        """Kernel with `temperature` [...] broadcast over the channels."""
        return cls(mean, log_std, temperature[..., None] * log_std.exp())

    def at(self, noise: Tensor) -> Tensor:
        """The value that standard normal `noise` [..., C] turns into."""
        return self.mean + self.std * noise


def log_ratio(numerator: Gaussian, source: Gaussian, x: Tensor, noise: Tensor) -> Tensor:
    """Log density of `numerator` over that of `source` at `x` [..., C], summed over C: [...].

    `x` must be `source.at(noise)`: the density of `source` is read off the noise, without the
    rounding of x - mean. Values that are not finite give NaN or -inf, which accept nothing.
    """
    score = (x - numerator.mean) / numerator.std
    exponent = 0.5 * (noise * noise - score * score)
    return (exponent + (source.log_std - numerator.log_std)).sum(-1)


def accept(log_uniform: Tensor, log_target_over_draft: Tensor) -> Tensor:
    """Whether each draft is kept, bool [...]; `log_uniform` is the log of a uniform number."""
    return log_uniform < log_target_over_draft


@dataclass(frozen=True)
class Envelope:
    """An upper bound of the residual (p - q)+ of two kernels that is easy to draw from.

    With z the noise that the target turns into a value, log p / q is constant + linear . z + square
    . z^2, and (p - q)+ = p (1 - q / p)+ is at most p times the positive parts of these terms, added
    up. Drawing from that bound takes about two candidates however close the kernels are, where
    draws from p take as many as refusals are rare. Where the bound is larger than p, it is p.

    `constant` [N], `linear`, `square` [N, C]; `weights` [N, C + 2]: the mass under the constant,
    under the linear term and under the square of each channel.
    """

    constant: Tensor
    linear: Tensor
    square: Tensor
    weights: Tensor

    @classmethod
    def of(cls, target: Gaussian, drafted: Gaussian) -> Envelope:
        """The bound for kernels [N, C]."""
        log_scale = target.log_std - drafted.log_std
        scale = log_scale.exp()
        shift = (target.mean - drafted.mean) / drafted.std
        constant = (0.5 * shift * shift - log_scale).sum(-1)
        linear, square = shift * scale, 0.5 * (scale * scale - 1)
        parts = [constant[:, None], _length(linear) * HALF_NORMAL, square]
        weights = torch.cat(parts, dim=-1).clamp(min=0)
        small = weights.sum(-1, keepdim=True) < 1
        whole = torch.zeros_like(weights)
        whole[:, 0] = 1
        return cls(constant, linear, square, torch.where(small, weights, whole))

    def draw(self, noise: Tensor, which: Tensor, spread: Tensor) -> Tensor:
        """Noise [N, K, C] of the target that is distributed as the bound.

        `noise` standard normal, [N, K, C]; `which` [N, K] uniform, it picks a term; `spread` [N, K]
        chi-square with two degrees of freedom.
        """
        upper = self.weights.cumsum(-1)[:, None]
        at = which[..., None] * upper[..., -1:]
        chosen = (at >= upper - self.weights[:, None]) & (at < upper)
        # Along the linear term a normal number becomes a Rayleigh one; of the channel of a square
        # the magnitude grows from one to three degrees of freedom.
        direction = (self.linear / _length(self.linear))[:, None]
        along = (noise * direction).sum(-1, keepdim=True)
        tilted = noise + (spread.sqrt()[..., None] - along) * direction
        longer = noise.sign() * (noise * noise + spread[..., None]).sqrt()
        drawn = torch.where(chosen[..., 1:2], tilted, noise)
        return torch.where(chosen[..., 2:], longer, drawn)

    def keep(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """Which of the drawn `noise` [N, K, C] belongs to the residual, bool [N, K]."""
        linear = (noise * self.linear[:, None]).sum(-1)
        squares = noise * noise
        ratio = self.constant[:, None] + linear + (squares * self.square[:, None]).sum(-1)
        bound = self.weights[:, :1] + linear.clamp(min=0)
        bound = bound + (squares * self.weights[:, None, 2:]).sum(-1)
        is_target = self.weights[:, :1] >= 1
        # Written as "not refused", so that a ratio of NaN keeps the candidate: a broken network
        # shows up as NaN in the sample at once instead of as an endless search.
        return ~(uniform * torch.where(is_target, 1.0, bound) >= 1 - (-ratio).exp())


def residual(
    target: Gaussian, drafted: Gaussian, noise: Tensor, choices: Tensor
) -> tuple[Tensor, Tensor]:
    """First of K candidates that belongs to the residual (p - q)+: value and its index.

    `target`, `drafted` [N, C]; the candidates come from standard normal `noise` [N, K, C] and
    `choices` [N, K, 3]: a uniform number, a chi-square one with two degrees of freedom, a uniform
    one. Returns [N, C] and the index [N] int64, which is K where no candidate was kept (the value
    is then the last candidate).
    """
    envelope = Envelope.of(target, drafted)
    which, spread, keep = choices.unbind(-1)
    drawn = envelope.draw(noise, which, spread)
    values = target.mean[:, None] + target.std[:, None] * drawn
    kept = envelope.keep(drawn, keep)
    count = kept.shape[1]
    order = torch.arange(count, device=kept.device)
    index = torch.where(kept, order, count).amin(1)
    return pick(values, index.clamp(max=count - 1)), index


def _length(vector: Tensor) -> Tensor:
    """Euclidean length over the last axis, which is kept."""
    return (vector * vector).sum(-1, keepdim=True).sqrt()


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Entry `index` [N] of each row of `values` [N, K, ...]: [N, ...]."""
    rows = torch.arange(len(index), device=index.device) * values.shape[1]
    return values.flatten(0, 1).index_select(0, rows + index)
