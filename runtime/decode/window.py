"""A window of drafted tokens, and what verification made of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cspd.runtime.decode.canvas import Canvas, Span
from cspd.runtime.heads.base import HeadSample


@dataclass(frozen=True)
class Window:
    """Drafted tokens of one round, in generation order, every tensor [B, P, ...] over one span.

    `group` [B, P] is the index of the autoregressive step within the window that drafted each
    token, `starts` [B][K] the known tokens before each of these steps.
    """

    span: Span
    drafted: HeadSample
    guidance: Tensor
    group: Tensor
    starts: list[list[int]]


@dataclass(frozen=True)
class Judged:
    """The verdict on a `window`: `target` [B, P, C], the target's own samples, same noise; masks.

    `accepted`, `rejected` and `kept` [B, P] bool: kept tokens are written, as drafted where they
    were accepted. Rejected ones were `resampled` from the residual, or took the target's token.
    Neither padding nor what follows a rejection under prefix verification has a verdict.
    """

    window: Window
    target: HeadSample
    accepted: Tensor
    rejected: Tensor
    kept: Tensor
    resampled: Tensor
    values: Tensor


def gather_window(
    canvas: Canvas, ahead: Canvas, steps: list[tuple[Span, HeadSample, Tensor]],
    starts: list[list[int]], width: int | None,
) -> Window:  # fmt: skip
    """Join the drafted steps into one window in generation order, padded to `width` tokens."""
    start = canvas.known
    span = canvas.span(start, ahead.known, width)
    shape = (*span.valid.shape, canvas.tokens.shape[-1])
    joined = [torch.zeros(shape, device=canvas.tokens.device) for _ in range(4)]
    guidance = torch.ones(span.valid.shape, device=canvas.tokens.device)
    group = torch.zeros(span.valid.shape, dtype=torch.int64, device=canvas.tokens.device)
    origin = torch.tensor(start, device=canvas.tokens.device)
    for index, (part, sampled, scale) in enumerate(steps):
        rows, columns = part.valid.nonzero(as_tuple=True)
        slots = torch.tensor(part.start, device=origin.device)[rows] - origin[rows] + columns
        values = (sampled.sample, sampled.mean, sampled.log_std, sampled.sum_log_std)
        for whole, value in zip(joined, values, strict=True):
            whole[rows, slots] = value[rows, columns]
        guidance[rows, slots] = scale[rows, columns]
        group[rows, slots] = index
    by_sample = [list(column) for column in zip(*starts, strict=True)]
    return Window(span, HeadSample(*joined), guidance, group, by_sample)
