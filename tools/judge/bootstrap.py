"""How sure a score is: its values on sets of images that are drawn again from the images made.

Images are drawn with replacement within each class, as many as the class has. Sets with one seed
are drawn alike, image by image, so that the noise they share cancels in their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

REPLICATES = 200
DEVIATIONS = 1.96  # either side of the value: 95 % of a normal distribution
METHOD = (
    f"95 %: {DEVIATIONS} standard deviations of {REPLICATES} bootstrap sets, drawn within classes"
)
LEAST_PER_CLASS = 2


@dataclass(frozen=True)
class Judged:
    """Scores by name, and for those with an interval their `redrawn` values [REPLICATES]."""

    score: dict[str, float | int]
    redrawn: dict[str, Tensor] = field(default_factory=dict)

    def intervals(self) -> dict[str, list[float]]:
        """Ends of the 95 % interval of every score that has one."""
        return {name: interval(self.score[name], found) for name, found in self.redrawn.items()}


def redraw(labels: Tensor, seed: int) -> Iterator[Tensor]:
    """Rows [N] of a redrawn set, `REPLICATES` times; `labels` [N] are the classes.

    Where a class has a single image, rows are drawn from all classes together, which gives wider
    intervals instead of none.
    """
    strata = labels if _smallest(labels) >= LEAST_PER_CLASS else torch.zeros_like(labels)
    order = strata.argsort(stable=True)
    _, counts = strata.unique(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    size = counts.repeat_interleave(counts)
    generator = torch.Generator().manual_seed(seed % 2**63)
    for _ in range(REPLICATES):
        chosen = torch.rand(len(labels), generator=generator, dtype=torch.float64) * size
        yield order[first + chosen.long()]


def replicates(statistic: Callable[[Tensor], float], labels: Tensor, seed: int) -> Tensor:
    """`statistic` of the rows of every redrawn set, [REPLICATES] float64.

    Within m images of a class the bootstrap's variance is (m - 1) / m of the true one on average;
    deviations from the mean are scaled to make up for it.
    """
    found = torch.tensor([statistic(rows) for rows in redraw(labels, seed)], dtype=torch.float64)
    least = _smallest(labels)
    size = least if least >= LEAST_PER_CLASS else len(labels)
    return found.mean() + (found - found.mean()) * (size / (size - 1)) ** 0.5


def half_width(redrawn: Tensor) -> float:
    """Half of the 95 % interval of a score with these `redrawn` values."""
    return DEVIATIONS * redrawn.std().item()


def interval(value: float, redrawn: Tensor) -> list[float]:
    """Both ends of the 95 % interval around `value`.

    Around the value and not around the mean of `redrawn`: a Frechet distance is biased upwards by
    its number of images, and a redrawn set adds that bias a second time.
    """
    half = half_width(redrawn)
    return [value - half, value + half]


def score_text(value: float, ends: list[float] | None, form: str) -> str:
    """A value with half its interval `ends`, in one unit: "93.5 ± 3.4%"."""
    half = half_text(value, ends, form)
    text = format(value, form)
    return (text.removesuffix("%") if half else text) + half


def half_text(value: float, ends: list[float] | None, form: str = ".2g") -> str:
    """Half the interval `ends` of `value`, after a sign; nothing without one."""
    return "" if ends is None else f" ± {format(ends[1] - value, form)}"


def _smallest(labels: Tensor) -> int:
    return int(labels.unique(return_counts=True)[1].min())
