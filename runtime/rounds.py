"""One round of speculative denoising in plain tensor operations: draft, verify, accept, resample.

`ReferenceRound` has the contract of the exported graph `speculative_round` and takes its place: N
tokens, each at its own step, advance by one to `length` steps with one call of the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
    the steps, and `reached` [N, L, C], what they lead to; `noise` [N, L, C]; `kernel` [N, L, C],
    the distribution that `reached` was drafted from.
    """

    steps: Tensor
    states: Tensor
    reached: Tensor
    noise: Tensor
    kernel: Gaussian


def draft_tables(schedule: Schedule, window: int) -> dict[str, Tensor]:
    """Drafts as linear maps: `draft_state` [S, 2, L, 2] and `draft_noise` [S, 2, L, L] float32.

    With x0 frozen a denoising step is x' = a x + b x0 + sigma xi. In a window of L that starts at
    step s, row j is drafted at the state draft_state[s, 0, j] @ (x, x0) + draft_noise[s, 0, j] @
    (sigma_0 xi_0, ..., sigma_j xi_j), with the mean that [s, 1, j] give. Sums of products in
    float64, never a quotient of products. On the CPU, wherever the schedule lies.
    """
    table = schedule.table.cpu().double()
    mean_x0, mean_x = (table[:, COLUMNS.index(name)] for name in ("mean_x0", "mean_x"))
    start = torch.arange(schedule.num_steps)
    state = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(start), 2)
    noise = torch.zeros(len(start), window, dtype=torch.float64)
    states, noises = [], []
    for j in range(window):
        step = (start - j).clamp(min=0)
        shift = torch.stack([torch.zeros(len(start)), mean_x0[step]], dim=1)
        mean, carried = mean_x[step, None] * state + shift, mean_x[step, None] * noise
        states.append(torch.stack([state, mean], 1))
        noises.append(torch.stack([noise, carried], 1))
        state, noise = mean, carried.clone()
        noise[:, j] = 1
    tables = {"draft_state": torch.stack(states, 2), "draft_noise": torch.stack(noises, 2)}
    return {name: table.float() for name, table in tables.items()}


class DraftTables:
    """The `draft_tables` of a window, computed once per schedule."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._known: dict[tuple[bytes, torch.device], dict[str, Tensor]] = {}

    def __call__(self, schedule: Schedule) -> dict[str, Tensor]:
        """The tables, where the schedule lies."""
        device = schedule.table.device
        key = schedule.betas.tobytes(), device
        if key not in self._known:
            tables = draft_tables(schedule, self.window)
            self._known[key] = {name: table.to(device) for name, table in tables.items()}
        return self._known[key]


def depths_of(window: int, num_steps: int, depth: np.ndarray | None) -> np.ndarray:
    """Rows of a token by step [S]: `depth`, or as many as the window and the chain hold."""
    longest = np.arange(1, num_steps + 1).clip(max=window)
    return longest if depth is None else np.minimum(depth, longest)


def rows_of(length: np.ndarray, window: int, count: int) -> dict[str, Tensor]:
    """Which (token, drafted state) pairs a round evaluates, as inputs of the round (all int32).

    `length` [N]: rows of each token, 0 for finished ones, at most `window` = L; `count` of rows,
    padded with copies of the first. Returns `row` [R], an index into the N * L drafted states,
    `row_token` [R], `slot` [N, L], the row of each state (beyond the last: the token's last row),
    and `length`.
    """
    offset = np.arange(window)
    row = np.zeros(count, dtype=np.int64)
    used = np.flatnonzero(offset < length[:, None])
    row[: len(used)] = used
    first = (length.cumsum() - length).clip(max=count - 1)
    slot = first[:, None] + np.minimum(offset, (length - 1).clip(min=0)[:, None])
    rows = {"row": row, "row_token": row // window, "slot": slot, "length": length}
    return {name: torch.from_numpy(value.astype(np.int32)) for name, value in rows.items()}


def draft(
    x: Tensor, step: Tensor, x0: Tensor, fraction: Tensor, temperature: Tensor, noise: Tensor,
    schedule: Tensor, draft_state: Tensor, draft_noise: Tensor,
) -> Window:  # fmt: skip
    """States of the next L steps if every step predicted the frozen `x0` and `fraction` [N, C].

    `x` [N, C] at `step` [N] int32; `noise` [S, N, C] by step; the last two are `draft_tables`.
    """
    offset = torch.arange(draft_noise.shape[-1], dtype=torch.int32, device=x.device)
    steps = (step[:, None] - offset).clamp(min=0)
    *_, low, high = embedding(steps, schedule).split(1, dim=-1)
    log_std = low + fraction[:, None] * (high - low)
    std = temperature[:, None, None] * log_std.exp()
    token = torch.arange(len(x), dtype=torch.int32, device=x.device)
    xi = embedding(steps * len(x) + token[:, None], noise.flatten(0, 1))
    start, added = steps[:, 0], std * xi
    ends = torch.stack([x, x0], dim=1)[:, None]
    maps = draft_state[start] @ ends + draft_noise[start] @ added[:, None]
    states, mean = maps.unbind(1)
    return Window(steps, states, mean + added, xi, Gaussian(mean, log_std, std))


class ReferenceRound:
    """The round as a session: what `speculative_round` computes, from a `denoiser` session."""

    def __init__(self, denoiser: Session) -> None:
        self.denoiser = denoiser

    def __call__(self, **tensors: Tensor) -> dict[str, Tensor]:
        """Advance N tokens; inputs and outputs are those of `speculative_round_spec`."""
        t = tensors
        window = draft(
            t["x"], t["step"], t["x0"], t["fraction"], t["temperature"], t["noise"],
            t["schedule"], t["draft_state"], t["draft_noise"],
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
        repaired, index = self.repair(at, drafted, drawn, t)
        newest = pick(t["slot"], last)
        # Without a candidate that was kept nothing moves: the round is done again with the next.
        count = t["candidates"].shape[1]
        done = ~rejected | (index < count)
        wide = done[:, None]
        return {
            "next_x": torch.where(wide, torch.where(rejected[:, None], repaired, drawn), t["x"]),
            "next_step": torch.where(done, t["step"] - last - 1, t["step"]).clamp(min=-1).int(),
            "next_x0": torch.where(wide, rows["x0"].index_select(0, newest), t["x0"]),
            "next_fraction": torch.where(
                wide, rows["fraction"].index_select(0, newest), t["fraction"]
            ),
            "mean": at.mean,
            "log_std": at.log_std,
            "sum_log_std": wide * committed_log_std(window.steps, target.log_std, last),
            "moved": torch.where(done, last + 1, 0).int(),
            "drawn": torch.where(rejected, (index + 1).clamp(max=count), 0).int(),
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
        row = torch.arange(window.steps.shape[1], device=window.steps.device)
        # Step 0 adds no noise: a Dirac, which no draft can meet.
        tested = (row < t["length"][:, None] - 1) & (window.steps > 0)
        passed = self.test(window, target, t) & tested
        return passed.long().cumprod(1).sum(1)

    def test(self, window: Window, target: Gaussian, t: dict[str, Tensor]) -> Tensor:
        """Which drafts pass, bool [N, L]: the exact rule."""
        ratio = coupling.log_ratio(target, window.kernel, window.reached, window.noise)
        return coupling.accept(log_accept(window, t), ratio)

    def repair(
        self, target: Gaussian, drafted: Gaussian, drawn: Tensor, t: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Replacement [N, C] for refused drafts, and the index of the candidate that it is."""
        return coupling.residual(target, drafted, t["candidates"], t["choices"])


def log_accept(window: Window, t: dict[str, Tensor]) -> Tensor:
    """The logarithms of the uniform numbers that belong to the steps of a window: [N, L]."""
    token = torch.arange(len(window.steps), device=window.steps.device)[:, None]
    return t["log_accept"][window.steps.long(), token]


def committed_log_std(steps: Tensor, log_std: Tensor, last: Tensor) -> Tensor:
    """Sum of `log_std` [N, L, C] over the steps that a round commits, without step 0: [N, C]."""
    row = torch.arange(steps.shape[1], device=steps.device)
    counts = (row <= last[:, None]) & (steps > 0)
    return (log_std * counts[..., None]).sum(1)
