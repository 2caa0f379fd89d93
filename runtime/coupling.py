"""Maximal coupling of two diagonal Gaussians: accept a draft or repair it; the law stays the same.

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


def residual(
    target: Gaussian, drafted: Gaussian, noise: Tensor, log_uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """First of K candidates that belongs to the residual law (p - q)+: value and its index.

    `target`, `drafted` [N, C]; `noise` [N, K, C] makes the candidates, draws from the target;
    `log_uniform` [N, K] keeps each with probability 1 - min(1, q / p). Returns [N, C] and the index
    [N] int64, which is K where no candidate was kept (the value is then the last candidate).
    """
    proposal = Gaussian(*(field[:, None] for field in (target.mean, target.log_std, target.std)))
    other = Gaussian(*(field[:, None] for field in (drafted.mean, drafted.log_std, drafted.std)))
    values = proposal.at(noise)
    # Written as "not refused", so that a ratio of NaN keeps the candidate: a broken network shows
    # up as NaN in the sample at once instead of as an endless search.
    kept = ~(log_uniform <= log_ratio(other, proposal, values, noise))
    count = kept.shape[1]
    order = torch.arange(count, device=kept.device)
    index = torch.where(kept, order, count).amin(1)
    return pick(values, index.clamp(max=count - 1)), index


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Entry `index` [N] of each row of `values` [N, K, ...]: [N, ...]."""
    rows = torch.arange(len(index), device=index.device) * values.shape[1]
    return values.flatten(0, 1).index_select(0, rows + index)


def excess_mass(shift: float, weight: float = 1.0) -> float:
    """Mass of (q - weight * p)+ of two Gaussians of equal variance, `shift` deviations apart.

    With weight 1 it is their total variation, the share of drafts that must be refused; weight w
    instead of 1, accepting with min(1, w p / q), costs the difference in total variation.
    """
    if shift == 0:
        return max(0.0, 1 - weight)
    bound = math.log(weight) / shift

    def below(value: float) -> float:
        return 0.5 * math.erfc(-value / math.sqrt(2))

    return below(shift / 2 - bound) - weight * below(-shift / 2 - bound)
