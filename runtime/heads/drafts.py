"""The drafts of speculative rounds as linear maps, and which rows of them a round evaluates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cspd.engines.schedule import COLUMNS, AnySchedule, Schedule


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
        self._known: dict[tuple[AnySchedule, int, torch.device], dict[str, Tensor]] = {}

    def __call__(self, schedule: Schedule) -> dict[str, Tensor]:
        """The tables, where the schedule lies."""
        device = schedule.table.device
        key = schedule.spec, schedule.num_steps, device
        if key not in self._known:
            tables = draft_tables(schedule, self.window)
            self._known[key] = {name: table.to(device) for name, table in tables.items()}
        return self._known[key]


def depths_of(window: int, num_steps: int) -> np.ndarray:
    """Rows that a token evaluates at each step [S]: as many as the window and the chain hold."""
    return np.arange(1, num_steps + 1).clip(max=window)


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
