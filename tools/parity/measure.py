"""How far two results are apart, and whether that is allowed: the rows of the parity ladder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What the ladder allows on each rung, as a multiple of the tolerance that the graph's contract
# states for one call: a denoising chain adds up the errors of its steps, an image those of its
# autoregressive steps.
TRAJECTORY_FACTOR = 10.0
IMAGE_FACTOR = 100.0
MAX_ERROR = 0.2  # however loose the contract: beyond, it is not the same image
# The same bound in pixels, decibels: 20 log10(peak 2 / (error x rms 1)), less some reserve.
MIN_PSNR = {"fp32": 40.0, "fp16": 20.0, "bf16": 18.0}
MAX_FLIPS = 0.01  # share of accept or reject decisions


@dataclass(frozen=True)
class ErrorStats:
    """Difference of a tensor from its reference over all its elements.

    `*_abs` are absolute; `*_rel` relative to the larger of the element and the root mean square of
    the reference, so that zeros do not blow up; `norm` is the norm of the difference over the norm
    of the reference, the figure that tolerances are about. Infinite where a value is not finite.
    """

    max_abs: float
    mean_abs: float
    p99_abs: float
    max_rel: float
    mean_rel: float
    p99_rel: float
    norm: float
    cosine: float


# What a result with NaN or infinity in it is compared to.
INF = math.inf
BROKEN = ErrorStats(INF, INF, INF, INF, INF, INF, INF, -1.0)


def measure(value: Tensor, reference: Tensor) -> ErrorStats:
    """Errors of `value` against `reference`, tensors of one shape, computed in float64."""
    if value.shape != reference.shape:
        raise ValueError(f"shapes {list(value.shape)} and {list(reference.shape)} differ")
    a, b = value.double().flatten(), reference.double().flatten()
    if not bool(a.isfinite().all() & b.isfinite().all()):
        return BROKEN
    scale = max(float(b.square().mean().sqrt()), 1e-30)
    absolute = (a - b).abs()
    relative = absolute / b.abs().clamp(min=scale)
    product = float(a.norm() * b.norm())
    return ErrorStats(
        *_summary(absolute),
        *_summary(relative),
        norm=float(absolute.norm()) / max(float(b.norm()), 1e-30),
        cosine=float(a @ b) / product if product else float(torch.equal(a, b)),
    )


def _summary(errors: Tensor) -> tuple[float, float, float]:
    """Maximum, mean and 99th percentile."""
    p99 = float(np.quantile(errors.numpy(), 0.99))
    return float(errors.max()), float(errors.mean()), p99


@dataclass(frozen=True)
class Row:
    """One comparison of the ladder.

    `subject` is what was compared (a graph and the backend that ran it), `output` which result,
    `case` on which inputs. `error` is the figure that `tolerance` limits; it is the relative error
    of the norm unless `unit` says otherwise. `gate` is False where the row describes something
    that the bundle does not hold, such as another precision.
    """

    rung: str
    subject: str
    output: str
    case: str
    error: float
    tolerance: float
    stats: ErrorStats | None = None
    unit: str = "relative"
    note: str = ""
    gate: bool = True
    higher_is_better: bool = False

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        if self.higher_is_better:
            return self.error >= self.tolerance
        return self.error <= self.tolerance

    @property
    def severity(self) -> float:
        """Error in units of the tolerance, for ranking; above 1 is a failure."""
        low, high = (self.tolerance, self.error)
        if self.higher_is_better:
            low, high = (self.error, self.tolerance)
        return high / low if low > 0 and math.isfinite(high) else float(not self.passed) * math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become null, which no reader takes for small."""
        return finite({**asdict(self), "passed": self.passed})


@dataclass(frozen=True)
class Skipped:
    """A comparison that this machine or bundle cannot make."""

    rung: str
    subject: str
    reason: str


def finite(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None, so that it is valid JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def worst(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """The worst row of each rung, subject and unit, in order of appearance, with their number."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.rung, row.subject, row.unit), []).append(row)
    return [(max(group, key=_rank), len(group)) for group in groups.values()]


def _rank(row: Row) -> tuple[bool, float]:
    return not row.passed, math.inf if math.isnan(row.severity) else row.severity
