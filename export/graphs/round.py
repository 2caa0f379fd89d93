"""The arithmetic of a speculative round, shared by the graphs of one round and of the whole loop.

Operation by operation that of the runtime's reference, so that both agree to the bit in PyTorch,
and arranged for few operations: on a CPU a small head costs what its operations cost. N tokens are
at their own steps, L is the window, C the channels; values of a token have the shape [N, 1, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

CANDIDATES = 8
HALF_NORMAL = 1 / math.sqrt(2 * math.pi)  # mean of the positive part of a standard normal number


class State(NamedTuple):
    """Where tokens are: `step` [N, 1] int32, at least 0; the frozen prediction x0 and fraction."""

    x: Tensor
    step: Tensor
    x0: Tensor
    fraction: Tensor


class Chain(NamedTuple):
    """What stays the same from round to round: see the inputs of `round_spec`."""

    temperature: Tensor  # [N]
    noise: Tensor  # [S, N, C]
    log_accept: Tensor  # [S, N]
    schedule: Tensor  # [S, K]
    draft_state: Tensor  # [S, 2, L, 2]
    draft_noise: Tensor  # [S, 2, L, L]


class Kernel(NamedTuple):
    """The target's view of drafted states, each [N, L, C]."""

    mean: Tensor
    log_std: Tensor
    x0: Tensor
    fraction: Tensor


class Advanced(NamedTuple):
    """Tokens after a round; `moved` steps and `drawn` candidates [N, 1]."""

    x: Tensor
    x0: Tensor
    fraction: Tensor
    mean: Tensor
    log_std: Tensor
    sum_log_std: Tensor
    done: Tensor
    moved: Tensor
    drawn: Tensor


class Drafted(NamedTuple):
    """The next L steps of every token, if each predicted the frozen x0 and fraction.

    `steps` [N, L], clamped at 0 where the chain has ended; `columns` of the schedule there, each
    [N, L, 1]; `states` before the steps, `mean` and `reached` after them, `log_std` of the step and
    its noise `xi`, each [N, L, C].
    """

    steps: Tensor
    columns: tuple[Tensor, ...]
    states: Tensor
    mean: Tensor
    reached: Tensor
    log_std: Tensor
    xi: Tensor


# From the drafted states [N, L, C], their steps [N, L] and the columns of the schedule there.
Verify = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Kernel]


def count(size: int, like: Tensor) -> Tensor:
    """0 to `size` - 1, int32."""
    return torch.arange(size, dtype=torch.int32, device=like.device)


def step_columns(schedule: Tensor) -> Tensor:
    """Columns that a round reads: those of the schedule but the time, then the range of log_std."""
    return torch.cat([schedule[:, 1:6], schedule[:, 6:] - schedule[:, 5:6]], dim=1)


def draft(state: State, chain: Chain) -> Drafted:
    """The states of the next L steps, without any network."""
    tokens, window = chain.noise.shape[1], chain.draft_noise.shape[-1]
    offset, token = count(window, state.x), count(tokens, state.x)[:, None]
    temperature, first = chain.temperature[:, None, None], state.step.flatten()
    steps = (state.step - offset).clamp(min=0)
    columns = embedding(steps, step_columns(chain.schedule)).split(1, dim=-1)
    *_, low, freedom = columns
    log_std = low + state.fraction * freedom
    xi = embedding(steps * tokens + token, chain.noise.flatten(0, 1))
    added = temperature * log_std.exp() * xi
    maps = [table.index_select(0, first) for table in (chain.draft_state, chain.draft_noise)]
    ends = torch.cat([state.x, state.x0], dim=1)[:, None]
    states, mean = (maps[0] @ ends + maps[1] @ added[:, None]).unbind(1)
    return Drafted(steps, columns, states, mean, mean + added, log_std, xi)


def judge(
    state: State, last_row: Tensor, chain: Chain, candidates: Tensor, choices: Tensor,
    drafted: Drafted, target: Kernel,
) -> Advanced:  # fmt: skip
    """Accept the drafts up to the first that fails, and draw what comes in its place."""
    tokens, window = chain.noise.shape[1], chain.draft_noise.shape[-1]
    offset, token = count(window, state.x), count(tokens, state.x)[:, None]
    temperature, xi = chain.temperature[:, None, None], drafted.xi
    # Accept.
    score = (drafted.reached - target.mean) / (temperature * target.log_std.exp())
    exponent = 0.5 * (xi * xi - score * score)
    ratio = (exponent + (drafted.log_std - target.log_std)).sum(-1, keepdim=True)
    # Step 0 adds no noise: a Dirac, which no draft can meet.
    # Joined, not selected by step: that would tie two axes, which the exporter then traces twice.
    log_accept = torch.cat(
        [torch.full_like(chain.log_accept[:1], math.inf), chain.log_accept[1:]]
    ).flatten()[:, None]
    passed = embedding(drafted.steps * tokens + token, log_accept) < ratio
    last = torch.where(passed, window, offset[:, None]).amin(1).minimum(last_row)
    committed = (offset <= last.minimum(state.step - 1))[..., None]
    sum_log_std = (target.log_std * committed).sum(1, keepdim=True)
    # The row where the round ends: draw from its kernel, or from the residual distribution.
    everything = torch.cat([*target, drafted.mean, drafted.log_std, xi], dim=-1)
    at = embedding(token * window + last, everything.flatten(0, 1)).chunk(7, dim=-1)
    target, (mean, log_std, xi) = Kernel(*at[:4]), at[4:]
    std = temperature * target.log_std.exp()
    kernel = mean, log_std, temperature * log_std.exp()
    z, kept = residual((target.mean, target.log_std), kernel, candidates, choices)
    index = torch.where(kept, count(candidates.shape[1], z)[:, None], CANDIDATES).amin(1)
    chosen = token * CANDIDATES + index.clamp(max=CANDIDATES - 1)
    rejected = (last < last_row) & (state.step > last)
    noise = torch.where(rejected[..., None], embedding(chosen, z.flatten(0, 1)), xi)
    done = (index < CANDIDATES) | ~rejected
    drawn = torch.where(rejected, (index + 1).clamp(max=CANDIDATES), 0)
    return Advanced(
        target.mean + std * noise, target.x0, target.fraction, target.mean, target.log_std,
        sum_log_std, done, last + 1, drawn,
    )  # fmt: skip


def advance(
    state: State, last_row: Tensor, chain: Chain, candidates: Tensor, choices: Tensor,
    verify: Verify,
) -> Advanced:  # fmt: skip
    """One round: draft, verify, accept, resample.

    `last_row` [N, 1] is the last row of the window that is evaluated for a token; `candidates`
    [N, K, C] and `choices` [N, K, 3] as `residual` takes them. A token none
    of whose candidates is kept is not `done`: what is returned of it counts for nothing but
    `drawn`.
    """
    drafted = draft(state, chain)
    target = verify(drafted.states, drafted.steps, drafted.columns)
    return judge(state, last_row, chain, candidates, choices, drafted, target)


def residual(
    target: tuple[Tensor, Tensor], drafted: tuple[Tensor, Tensor, Tensor], noise: Tensor,
    choices: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Candidates of the residual as noise of the target [N, K, C]; which are kept [N, K, 1].

    `target` (mean, log_std), `drafted` (mean, log_std, std), each [N, 1, C]. The bound
    that proposals are drawn from is derived in docs/explanation/lossless.md.
    """
    mean, log_std, std = drafted
    log_scale = target[1] - log_std
    scale, shift = log_scale.exp(), (target[0] - mean) / std
    constant = (0.5 * shift * shift - log_scale).sum(-1, keepdim=True)
    linear, square = shift * scale, 0.5 * (scale * scale - 1)
    length = (linear * linear).sum(-1, keepdim=True).sqrt()
    weights = torch.cat([constant, length * HALF_NORMAL, square], dim=-1).clamp(min=0)
    small = weights.sum(-1, keepdim=True) < 1
    whole = (count(weights.shape[-1], noise) == 0).float()
    weights = torch.where(small, weights, whole)
    upper = weights.cumsum(-1)
    which, spread, keep = choices.split(1, dim=-1)
    at = which * upper[..., -1:]
    chosen = (at >= upper - weights) & (at < upper)
    direction = linear / length
    along = (noise * direction).sum(-1, keepdim=True)
    tilted = noise + (spread.sqrt() - along) * direction
    longer = noise.sign() * (noise * noise + spread).sqrt()
    z = torch.where(chosen[..., 2:], longer, torch.where(chosen[..., 1:2], tilted, noise))
    slope, squares = (z * linear).sum(-1, keepdim=True), z * z
    ratio = constant + slope + (squares * square).sum(-1, keepdim=True)
    flat, _, curved = weights.split([1, 1, noise.shape[-1]], dim=-1)
    bound = flat + slope.clamp(min=0) + (squares * curved).sum(-1, keepdim=True)
    height = torch.where(small, bound, 1.0)
    # Written as "not refused", so that NaN keeps a candidate.
    return z, ~(keep * height >= 1 - (-ratio).exp())
