"""Accept or replace drafted tokens: tensors and random numbers in, verdicts out."""

from __future__ import annotations

import torch
from torch import Tensor

from cspd.runtime.decode import acceptance
from cspd.runtime.decode.canvas import Batch
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.decode.window import Judged, Window
from cspd.runtime.heads.base import HeadSample
from cspd.runtime.noise import Purpose


def judge(
    sampler: Sampler, options: CspdOptions, batch: Batch, window: Window, target: HeadSample
) -> Judged:
    """The verdict on `window`, given the `target`'s own samples of its tokens."""
    valid = window.span.valid
    accepted = acceptance.accept(*weigh(sampler, options, batch, window, target)) & valid
    rejected, kept = valid & ~accepted, valid
    if options.verify == "prefix":
        # Keep everything before the first rejection, and the rejected token itself, replaced.
        kept = valid & (rejected.cumsum(1) - rejected.int() == 0)
        accepted, rejected = accepted & kept, rejected & kept
    # Never zeros: where nothing else is drawn, the target's own aligned sample.
    values = torch.where(accepted[..., None], window.drafted.sample, target.sample)
    resampled = torch.zeros_like(rejected)
    if options.on_reject == "residual":
        resampled = resample(sampler, options, batch, window, target, rejected, values)
    return Judged(window, target, accepted, rejected, kept, resampled, values)


def weigh(
    sampler: Sampler, options: CspdOptions, batch: Batch, window: Window, target: HeadSample
) -> tuple[Tensor, Tensor]:
    """Log acceptance ratio of every drafted token, and its uniform number: both [B, P].

    The densities are those of the kernels that were sampled, the sampler's temperature included.
    """
    positions = window.span.positions.long()
    images = batch.images[:, None].expand_as(positions)
    zero = torch.zeros((), dtype=torch.int64, device=positions.device)
    uniform = sampler.noise.uniform(Purpose.ACCEPT, images, positions, zero)[..., 0]
    temperature = options.accept_temperature * sampler.temperature
    drafted = window.drafted
    return acceptance.accept_log_ratio(drafted.sample, drafted, target, temperature), uniform


def resample(
    sampler: Sampler, options: CspdOptions, batch: Batch, window: Window, target: HeadSample,
    rejected: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """Put residual samples into `values` [B, P, C] where `rejected`; returns where one was found.

    Candidates and their test have the temperature of the sampler, like the kernels they replace.
    """
    found = torch.zeros_like(rejected)
    rows, columns = rejected.nonzero(as_tuple=True)
    if not len(rows):
        return found
    drafted, own = (
        HeadSample(*(t[rows, columns] for t in (s.sample, s.mean, s.log_std, s.sum_log_std)))
        for s in (window.drafted, target)
    )
    tries = torch.arange(options.max_tries, device=rows.device)[:, None]
    keys = (batch.images[rows], window.span.positions[rows, columns].long(), tries)
    normal = sampler.noise.normal(Purpose.RESAMPLE, *keys, values.shape[-1])
    uniform = sampler.noise.uniform(Purpose.RESAMPLE_ACCEPT, *keys)[..., 0]
    temperature = options.residual_temperature * sampler.temperature
    drawn = acceptance.resample(drafted, own, temperature, normal, uniform)
    values[rows[drawn.found], columns[drawn.found]] = drawn.values[drawn.found]
    found[rows, columns] = drawn.found
    return found
