"""One round of speculative denoising in plain tensor operations: draft, verify, accept, resample.

`ReferenceRound` has the contract of the exported graph `speculative_round` and takes its place: N
tokens, each at its own step, advance by one to `length` steps with one call of the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from cspd.engines.schedule import COLUMNS, Schedule
from cspd.engines.session import Session
from cspd.runtime import coupling
from cspd.runtime.coupling import Gaussian, pick


@dataclass(frozen=True)
class Window:
    """Drafted states of N tokens over L steps, before the target has seen them.

    `steps` [N, L] int32, clamped at 0 where the chain has ended; `states` [N, L, C], the inputs of
    the steps; `noise` [N, L, C]; `kernel` [N, L, C], the law that the next state was drafted from.
    """

    steps: Tensor
    states: Tensor
    noise: Tensor
    kernel: Gaussian


def draft_table(schedule: Schedule, window: int) -> Tensor:
    """Drafted states as linear maps, [S, L, L + 2] float32 for `window` = L.

    With x0 frozen a denoising step is x' = a x + b x0 + sigma xi, so that state j of a window that
    starts at step s is a fixed combination of (x, x0, sigma_0 xi_0, ..., sigma_{L-1} xi_{L-1}): row
    [s, j] holds its coefficients. Sums of products in float64, never a quotient of products.
    """
    columns = (schedule.table[:, COLUMNS.index(name)].double() for name in ("mean_x0", "mean_x"))
    mean_x0, mean_x = columns
    start = torch.arange(schedule.num_steps)
    table = torch.zeros(schedule.num_steps, window, window + 2, dtype=torch.float64)
    table[:, 0, 0] = 1
    for j in range(1, window):
        step = (start - j + 1).clamp(min=0)
        table[:, j] = mean_x[step, None] * table[:, j - 1]
        table[:, j, 1] += mean_x0[step]
        table[:, j, j + 1] = 1
    return table.float()


def rows_of(length: Tensor, window: int, count: int) -> dict[str, Tensor]:
    """Which (token, drafted state) pairs a round evaluates, as inputs of the round (all int32).

    `length` [N] int64: rows of each token, 0 for finished ones, at most `window` = L; `count` of
    rows, padded with copies of the first. Returns `row` [R], an index into the N * L drafted
    states, `row_token` [R], `slot` [N, L], the row of each state (beyond the last: the token's last
    row), and `length`.
    """
    offset = torch.arange(window, device=length.device)
    row = (offset < length[:, None]).flatten().nonzero()[:, 0]
    row = torch.nn.functional.pad(row, (0, count - len(row)))
    first = (length.cumsum(0) - length).clamp(max=len(row) - 1)
    slot = first[:, None] + torch.minimum(offset, (length - 1).clamp(min=0)[:, None])
    rows = {"row": row, "row_token": row // window, "slot": slot, "length": length}
    return {name: value.int() for name, value in rows.items()}


def draft(
    x: Tensor, step: Tensor, x0: Tensor, fraction: Tensor, temperature: Tensor, noise: Tensor,
    schedule: Tensor, drafts: Tensor,
) -> Window:  # fmt: skip
    """States of the next L steps if every step predicted the frozen `x0` and `fraction` [N, C].

    `x` [N, C] at `step` [N] int32; `noise` [N, S, C] by step; `drafts` [S, L, L + 2] is
    `draft_table`.
    """
    offset = torch.arange(drafts.shape[1], dtype=torch.int32, device=x.device)
    steps = (step[:, None] - offset).clamp(min=0)
    *_, mean_x0, mean_x, low, high = embedding(steps, schedule).split(1, dim=-1)
    fraction = fraction[:, None]
    log_std = fraction * high + (1 - fraction) * low
    std = temperature[:, None, None] * log_std.exp()
    xi = embedding(by_step(steps, schedule), noise.flatten(0, 1))
    sources = torch.cat([x[:, None], x0[:, None], std * xi], dim=1)
    states = drafts[step.clamp(min=0)] @ sources
    mean = mean_x0 * x0[:, None] + mean_x * states
    return Window(steps, states, xi, Gaussian(mean, log_std, std))


def by_step(steps: Tensor, schedule: Tensor) -> Tensor:
    """Index [N, L] of each token's `steps` in a table of N tokens times S steps."""
    token = torch.arange(len(steps), dtype=torch.int32, device=steps.device)
    return token[:, None] * len(schedule) + steps


class ReferenceRound:
    """The round as a session: what `speculative_round` computes, from a `denoiser` session."""

    def __init__(self, denoiser: Session) -> None:
        self.denoiser = denoiser

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Advance N tokens; inputs and outputs are those of `speculative_round_spec`."""
        t = tensors
        window = draft(
            t["x"], t["step"], t["x0"], t["fraction"], t["temperature"], t["noise"],
            t["schedule"], t["drafts"],
        )  # fmt: skip
        rows = self.verify(window, t)
        mean, log_std = (embedding(t["slot"], rows[name]) for name in ("mean", "log_std"))
        target = Gaussian.kernel(mean, log_std, t["temperature"][:, None])
        last = self.accept(window, target, t)
        at = Gaussian(*(pick(v, last) for v in vars(target).values()))
        drafted = Gaussian(*(pick(v, last) for v in vars(window.kernel).values()))
        # The last row of a window was never drafted: its kernel is known, so draw from it.
        drawn = at.at(pick(window.noise, last))
        rejected = (last < t["length"] - 1) & (pick(window.steps, last) > 0)
        repaired, index = coupling.residual(at, drafted, t["candidates"], t["log_keep"])
        newest = pick(t["slot"], last)
        return {
            "x": torch.where(rejected[:, None], repaired, drawn),
            "step": (t["step"] - last - 1).clamp(min=-1).int(),
            "x0": rows["x0"].index_select(0, newest),
            "fraction": rows["fraction"].index_select(0, newest),
            "mean": at.mean,
            "log_std": at.log_std,
            "sum_log_std": committed_log_std(window.steps, target.log_std, last),
            "accepted": last.int(),
            "draws": torch.where(rejected, index + 1, 0).int(),
            "drafted_mean": drafted.mean,
            "drafted_log_std": drafted.log_std,
        }

    def verify(self, window: Window, t: dict[str, Tensor]) -> dict[str, Tensor]:
        """The target's view of the drafted states, by row: one call of the denoiser."""
        return self.denoiser(
            x=window.states.flatten(0, 1).index_select(0, t["row"]),
            step=window.steps.flatten().index_select(0, t["row"]),
            token=t["row_token"],
            conditions=t["conditions"],
            guidance=t["guidance"].index_select(0, t["row_token"]),
            schedule=t["schedule"],
        )

    def accept(self, window: Window, target: Gaussian, t: dict[str, Tensor]) -> Tensor:
        """Row at which each token's round ends, [N] int64: the drafts of all rows before passed."""
        transitions = Gaussian(*(v[:, :-1] for v in vars(target).values()))
        source = Gaussian(*(v[:, :-1] for v in vars(window.kernel).values()))
        noise, reached = window.noise[:, :-1], window.states[:, 1:]
        ratio = coupling.log_ratio(transitions, source, reached, noise)
        at = by_step(window.steps[:, :-1], t["schedule"])
        log_uniform = t["log_accept"].flatten()[at.long()]
        tests = torch.arange(at.shape[1], device=at.device)
        passed = coupling.accept(log_uniform, ratio) & (tests < t["length"][:, None] - 1)
        return passed.long().cumprod(1).sum(1)


def committed_log_std(steps: Tensor, log_std: Tensor, last: Tensor) -> Tensor:
    """Sum of `log_std` [N, L, C] over the steps that a round commits, without step 0: [N, C]."""
    row = torch.arange(steps.shape[1], device=steps.device)
    counts = (row <= last[:, None]) & (steps > 0)
    return (log_std * counts[..., None]).sum(1)
