"""The denoising schedule as a table: the arithmetic of diffusion that the graphs take as an input.

A table row holds everything that one denoising step needs, so that graphs are independent of the
number of steps. Computed in float64 and stored in float32. (Nichol and Dhariwal 2021, cosine
schedule, learned range of variances, and their respacing of the training steps.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cspd.engines.errors import CspdError

# Columns of the table. x0 = noise_to_x0[0] * x - noise_to_x0[1] * eps;
# mean = mean_x0 * x0 + mean_x * x; log_std lies between log_std_min and log_std_max.
COLUMNS = (
    "timestep", "x0_from_x", "x0_from_noise", "mean_x0", "mean_x", "log_std_min", "log_std_max",
)  # fmt: skip
MAX_BETA = 0.999


class ScheduleSpec(BaseModel):
    """What a model was trained with; part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = Field("cosine", pattern="^cosine$")
    train_steps: int = Field(1000, ge=2, le=100_000)
    # Highest time step that is used. Above about 980 of 1000 the first step is ill-conditioned.
    clip_timesteps: int | None = Field(None, ge=1)

    @property
    def last_timestep(self) -> int:
        """The highest time step of the chain, where sampling begins."""
        last = self.train_steps - 1
        return last if self.clip_timesteps is None else min(last, self.clip_timesteps)


@dataclass(frozen=True)
class Schedule:
    """A respaced schedule: index 0 is the last denoising step, index S - 1 the first.

    `timesteps` [S] int64 on the training grid; `table` [S, len(COLUMNS)] float32;
    `alphas_cumprod`, `betas` [S] float64 of the respaced chain.
    """

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray
    betas: np.ndarray
    table: Tensor

    @property
    def num_steps(self) -> int:
        """Number of denoising steps S."""
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its table on `device`."""
        return replace(self, table=self.table.to(device))


def make_schedule(spec: ScheduleSpec, num_steps: int) -> Schedule:
    """The schedule of `spec` respaced to `num_steps` steps, evenly spread over the usable times."""
    last = spec.last_timestep
    if not 2 <= num_steps <= last + 1:
        raise CspdError(f"head steps: got {num_steps}, expected 2..{last + 1} for this model")
    timesteps = np.array([round(i * last / (num_steps - 1)) for i in range(num_steps)])
    ab = _cosine_alphas_cumprod(spec.train_steps)[timesteps]
    ab_prev = np.append(1.0, ab[:-1])
    betas = 1 - ab / ab_prev
    posterior = betas * (1 - ab_prev) / (1 - ab)
    columns = [
        timesteps,
        1 / np.sqrt(ab),
        np.sqrt(1 / ab - 1),
        betas * np.sqrt(ab_prev) / (1 - ab),
        (1 - ab_prev) * np.sqrt(1 - betas) / (1 - ab),
        # The last step's own posterior variance is 0; its neighbour's stands in for it.
        0.5 * np.log(np.append(posterior[1], posterior[1:])),
        0.5 * np.log(betas),
    ]
    table = torch.from_numpy(np.stack(columns, axis=1)).float()
    return Schedule(timesteps, ab, betas, table)


def _cosine_alphas_cumprod(train_steps: int) -> np.ndarray:
    """Cumulative signal power of the cosine schedule, [train_steps] float64."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - signal((i + 1) / train_steps) / signal(i / train_steps), MAX_BETA)
        for i in range(train_steps)
    ]
    return np.cumprod(1 - np.array(betas))
