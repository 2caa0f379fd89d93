"""The denoising schedule as a table: the arithmetic of diffusion that the graphs take as an input.

A table row holds everything that one denoising step needs, so that graphs are independent of the
number of steps. Computed in float64 and stored in float32. (Nichol and Dhariwal 2021, cosine
schedule, learned range of variances, and their respacing of the training steps.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self, overload

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

    kind: Literal["cosine"] = "cosine"
    train_steps: int = Field(1000, ge=2, le=100_000)
    # Highest time step that is used. Above about 980 of 1000 the first step is ill-conditioned.
    clip_timesteps: int | None = Field(None, ge=1)

    @property
    def words(self) -> str:
        """What it is, for people."""
        clip = f", clipped at {self.clip_timesteps}" if self.clip_timesteps else ""
        return f"cosine schedule{clip}"

    @property
    def last_timestep(self) -> int:
        """The highest time step of the chain, where sampling begins."""
        last = self.train_steps - 1
        return last if self.clip_timesteps is None else min(last, self.clip_timesteps)

    @property
    def most_steps(self) -> int:
        """The largest number of denoising steps."""
        return self.last_timestep + 1


class FlowSpec(BaseModel):
    """Flow matching: x = (1 - s) x0 + s noise at noise level s, sampled from s = 1 to 0.

    `num_steps` noise levels lie evenly between 1 and `last`; the last step goes from there to 0.
    Every step adds noise of variance 2 s (s - s'), but the last, which adds none: with
    `euler_at_last` it follows the predicted velocity over the length `last`, else it is the mean of
    such a step. `shift` bends the levels. `out` is what the head predicts, `embeds` what it is told
    of the time. (NextStep-1, SphereAR and xAR as their authors sample them.)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["flow"] = "flow"
    last: float = Field(0.04, gt=0, lt=1)
    shift: float = Field(1.0, gt=0, allow_inf_nan=False)
    out: Literal["data - noise", "noise - data"]
    embeds: Literal["1 - s", "1000 (1 - s)", "int(1000 s)"]
    euler_at_last: bool

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"flow schedule, last level {self.last:g}, shift {self.shift:g}"

    @property
    def most_steps(self) -> int:
        """The largest number of denoising steps."""
        return 1000


AnySchedule = Annotated[ScheduleSpec | FlowSpec, Field(discriminator="kind")]


@dataclass(frozen=True)
class Schedule:
    """The steps of a denoising chain of `spec`: index 0 is the last one, index S - 1 the first.

    `table` [S, len(COLUMNS)] float32.
    """

    spec: ScheduleSpec | FlowSpec
    table: Tensor

    @property
    def num_steps(self) -> int:
        """Number of denoising steps S."""
        return len(self.table)

    def to(self, device: torch.device | str) -> Self:
        """The same schedule with its table on `device`."""
        return replace(self, table=self.table.to(device))


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """`timesteps` [S] int64 on the training grid; powers and betas [S] float64 of the chain."""

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray
    betas: np.ndarray


@overload
def make_schedule(spec: ScheduleSpec, num_steps: int) -> CosineSchedule: ...
@overload
def make_schedule(spec: FlowSpec, num_steps: int) -> Schedule: ...


def make_schedule(spec: ScheduleSpec | FlowSpec, num_steps: int) -> Schedule:
    """The schedule of `spec` in `num_steps` steps, evenly spread over the usable times."""
    if not 2 <= num_steps <= spec.most_steps:
        raise CspdError(
            f"head steps: got {num_steps}, expected 2..{spec.most_steps} for this model"
        )
    return _flow(spec, num_steps) if isinstance(spec, FlowSpec) else _cosine(spec, num_steps)


def _cosine(spec: ScheduleSpec, num_steps: int) -> CosineSchedule:
    last = spec.last_timestep
    timesteps = np.array([round(i * last / (num_steps - 1)) for i in range(num_steps)])
    ab = _cosine_alphas_cumprod(spec.train_steps)[timesteps]
    ab_prev = np.append(1.0, ab[:-1])
    betas = 1 - ab / ab_prev
    posterior = betas * (1 - ab_prev) / (1 - ab)
    table = _table(
        timesteps,
        1 / np.sqrt(ab),
        np.sqrt(1 / ab - 1),
        betas * np.sqrt(ab_prev) / (1 - ab),
        (1 - ab_prev) * np.sqrt(1 - betas) / (1 - ab),
        # The last step's own posterior variance is 0; its neighbour's stands in for it.
        0.5 * np.log(np.append(posterior[1], posterior[1:])),
        0.5 * np.log(betas),
    )
    return CosineSchedule(spec, table, timesteps, ab, betas)


def _table(*columns: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _flow(spec: FlowSpec, num_steps: int) -> Schedule:
    signal = np.linspace(1 - spec.last, 0, num_steps)
    level = 1 - signal / (signal + spec.shift * (1 - signal))
    below = np.append(0.0, level[:-1])
    size = level - below
    # The score of the data adds -noise per unit of s to the velocity noise - x0.
    mean_x0, mean_x = size * (2 - level) / level, 1 - 2 * size / level
    if spec.euler_at_last:
        mean_x0[0], mean_x[0] = spec.last / level[0], 1 - spec.last / level[0]
    log_std = 0.5 * np.log(2 * level * size)
    # The last step adds no noise; its neighbour's stands in, as above.
    log_std[0] = log_std[1]
    sign = 1 if spec.out == "noise - data" else -1
    ones = np.ones(num_steps)
    table = _table(_embedded(spec, level), ones, sign * level, mean_x0, mean_x, log_std, log_std)
    return Schedule(spec, table)


def _embedded(spec: FlowSpec, level: np.ndarray) -> np.ndarray:
    """What the head is told of the time at each noise `level`."""
    if spec.embeds == "int(1000 s)":
        return np.floor(1000 * level.astype(np.float32))
    return (1 - level) * (1000 if spec.embeds == "1000 (1 - s)" else 1)


def _cosine_alphas_cumprod(train_steps: int) -> np.ndarray:
    """Cumulative signal power of the cosine schedule, [train_steps] float64."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - signal((i + 1) / train_steps) / signal(i / train_steps), MAX_BETA)
        for i in range(train_steps)
    ]
    return np.cumprod(1 - np.array(betas))
