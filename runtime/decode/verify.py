"""The target's view of drafted tokens, under either way to verify them."""

from __future__ import annotations

import torch
from torch import Tensor

from cspd.runtime.decode.canvas import Batch, Canvas, Span
from cspd.runtime.decode.member import Model
from cspd.runtime.decode.sampler import Sampler
from cspd.runtime.decode.window import Window
from cspd.runtime.heads.base import HeadSample
from cspd.runtime.noise import Purpose


def verify(
    sampler: Sampler,
    target: Model,
    way: str,
    batch: Batch,
    canvas: Canvas,
    window: Window,
) -> HeadSample:
    """The target's own samples [B, P, C] of all drafted tokens, same noise and guidance.

    `way` "parallel" conditions every token on what was known before the window, "prefix" each
    drafted step on the drafts before it.
    """
    if way == "parallel":
        z = sampler.conditions(target, canvas, batch, window.span)
    else:
        z = prefix_conditions(sampler, target, batch, canvas, window)
    # As many denoising steps as the step had that drafted a token.
    known = torch.tensor(window.starts).gather(1, window.group.cpu())
    counts = sampler.step_counts(known)
    return sampler.sample(target, z, window.guidance, batch, window.span, Purpose.DENOISE, counts)


def prefix_conditions(
    sampler: Sampler, target: Model, batch: Batch, canvas: Canvas, window: Window
) -> Tensor:
    """Target conditions [G, B, P, D] where each drafted step sees the drafts before it.

    All prefixes of all samples are one batch, unless shapes must not depend on how many there are:
    then each prefix is a call.
    """
    ahead = canvas.clone()
    ahead.place(window.span, window.drafted.sample)
    steps = range(len(window.starts[0]))
    chunks = [[step] for step in steps] if sampler.widened else [list(steps)]
    parts = [_prefixes(sampler, target, batch, ahead, window, chunk) for chunk in chunks]
    z = torch.cat(parts, dim=2)
    index = window.group[None, :, None, :, None].expand(z.shape[0], -1, 1, -1, z.shape[-1])
    return z.gather(2, index)[:, :, 0]


def _prefixes(
    sampler: Sampler, target: Model, batch: Batch, ahead: Canvas, window: Window, steps: list[int]
) -> Tensor:
    """Conditions [G, B, K, P, D] of the window from what K of its drafted `steps` begin with."""
    groups = len(steps)
    visible = [starts[step] for starts in window.starts for step in steps]
    many = Canvas(
        ahead.tokens.repeat_interleave(groups, 0),
        ahead.sequence.repeat_interleave(groups, 0),
        visible,
    )
    images = Batch(
        batch.images.repeat_interleave(groups),
        batch.labels.repeat_interleave(groups),
        batch.null_label,
        count=0,
    )
    positions = window.span.positions.repeat_interleave(groups, 0)
    span = Span(visible, visible, positions, window.span.valid.repeat_interleave(groups, 0))
    z = sampler.conditions(target, many, images, span)
    # A copy: the next call of the session may reuse its outputs.
    return z.reshape(z.shape[0], len(batch), groups, *z.shape[2:]).clone()
