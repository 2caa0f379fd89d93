"""Acceptance and resampling of continuous speculative decoding, in log space.

The criterion of the paper (arXiv 2411.11925, section 3) compares the densities of the last
denoising step of two aligned chains. It is *approximate*: the densities belong to two different
paths, so accepted tokens do not follow the target's output distribution exactly
(docs/explanation/cspd.md).
Pure mathematics: tensors and random numbers in, tensors out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cspd.runtime.heads.base import HeadSample


@dataclass(frozen=True)
class Resampled:
    """Tokens in place of rejected ones: `values` [N, C], 0 where `found` [N] is false."""

    values: Tensor
    found: Tensor


def log_density(x: Tensor, mean: Tensor, log_std: Tensor, temperature: float) -> Tensor:
    """Log density [..., C] -> [...] of a diagonal Gaussian up to a constant.

    `temperature` multiplies the standard deviation. It holds the factor that the kernel was sampled
    with, and the width of the test: 1 in the paper's formula, 42 in the authors' released code.
    """
    scaled = (x - mean) * (-log_std).exp() / temperature
    return (-0.5 * scaled.square() - log_std).sum(-1)


def accept_log_ratio(
    x: Tensor, drafted: HeadSample, target: HeadSample, temperature: float
) -> Tensor:
    """Log of the acceptance ratio r at tokens `x` [..., N, C], as [..., N].

    r = Sigma p(x) / q(x), where Sigma = prod sigma_q / sigma_p over the earlier denoising steps:
    with shared noise all other factors of the two path densities cancel. Non-finite ratios become
    -inf, so that a broken draft is rejected and never accepted. (Paper, equations 9 and 10.)
    """
    log_sigma = (drafted.sum_log_std - target.sum_log_std).sum(-1)
    log_p = log_density(x, target.mean, target.log_std, temperature)
    log_q = log_density(x, drafted.mean, drafted.log_std, temperature)
    ratio = log_sigma + log_p - log_q
    return torch.where(ratio.isfinite(), ratio, -torch.inf)


def accept(log_ratio: Tensor, uniform: Tensor) -> Tensor:
    """Whether each token is kept: [N] bool from `log_ratio` [N] and `uniform` [N] in (0, 1)."""
    return uniform.log() < log_ratio.clamp(max=0)


def resample(
    drafted: HeadSample, target: HeadSample, temperature: float, normal: Tensor, uniform: Tensor
) -> Resampled:
    """Draw from the residual of the target by acceptance-rejection, all tries at once.

    Candidates come from the target's last kernel at `temperature`, and are kept with probability
    max(0, 1 - q / (Sigma p)), all densities at this temperature. Acceptance and residual are
    complementary where it is that of the test. `normal` [M, N, C] and `uniform` [M, N] hold the
    random numbers of M tries; the first success counts. A candidate that is not finite has no
    density and is never kept. (Paper, section 3.3.)
    """
    candidates = target.mean + temperature * target.log_std.exp() * normal
    log_ratio = accept_log_ratio(candidates, drafted, target, temperature)
    # log(1 - 1 / r) where r > 1; elsewhere the residual has no mass.
    keep = torch.where(log_ratio > 0, torch.log1p(-torch.exp(-log_ratio.clamp(min=0))), -torch.inf)
    success = uniform.log() < keep
    found, first = success.any(0), success.int().argmax(0)
    values = candidates.gather(0, first[None, :, None].expand(1, *candidates.shape[1:]))[0]
    return Resampled(values * found[:, None], found)
