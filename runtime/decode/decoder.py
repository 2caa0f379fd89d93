"""What every decoding method is: a batch in, rounds out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cspd.runtime.decode.canvas import Batch, Canvas
from cspd.runtime.decode.stats import Statistics
from cspd.runtime.decode.window import Judged


@dataclass(frozen=True)
class Round:
    """What decoding has just done: an autoregressive step of one model, or a verification.

    `canvas` and `statistics` belong to the decoder, which goes on changing them. `judged` is the
    window of drafts that was verified, None for a step.
    """

    canvas: Canvas
    statistics: Statistics
    judged: Judged | None = None


class Decoder(Protocol):
    """A decoding method with its models."""

    def rounds(self, batch: Batch) -> Iterator[Round]:
        """Make the images of `batch`, a round at a time; the last round leaves them complete."""
        ...


OnRound = Callable[[Canvas, Statistics], None]


def ignore_progress(canvas: Canvas, statistics: Statistics) -> None:
    """The progress callback that does nothing."""


def decode(
    decoder: Decoder, batch: Batch, on_round: OnRound = ignore_progress
) -> tuple[Canvas, Statistics]:
    """The images of `batch` as `decoder` makes them, and what it counted.

    `on_round(canvas, statistics)` is called after every round.
    """
    for done in decoder.rounds(batch):
        on_round(done.canvas, done.statistics)
    return done.canvas, done.statistics
