"""What a run counted: calls, proposals and their fate, per autoregressive step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields

from pydantic import TypeAdapter

from cspd.engines.sessions.session import CallStats


@dataclass
class Verdicts:
    """Fate of proposed tokens. `discarded` ones came after a rejection and were never judged.

    A rejected token is `replaced_by_target` where that was asked for (`--on-reject target`). Else
    it is `resampled` from the residual, or, if that fails, takes the target's token: a `fallback`.
    """

    proposed: int = 0
    accepted: int = 0
    resampled: int = 0
    replaced_by_target: int = 0
    fallback: int = 0
    discarded: int = 0

    def add(self, other: Verdicts) -> None:
        """Add the counts of `other`."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    @property
    def adds_up(self) -> bool:
        """Whether these are counts, and every proposed token has exactly one fate."""
        proposed, *fates = (getattr(self, item.name) for item in fields(self))
        # bool is an int to Python; records hold no such counts.
        counts = all(type(count) is int and count >= 0 for count in (proposed, *fates))
        return counts and proposed == sum(fates)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens per judged token; None if nothing was judged."""
        judged = self.proposed - self.discarded
        return self.accepted / judged if judged else None


@dataclass
class Statistics:
    """Counts of one batch or, summed up, of a run.

    `rounds` maps the number of known tokens at the start of a verification round to its verdicts.
    `target_rounds` counts what the target does one after another: its own autoregressive steps and
    verifications. `target_calls` counts evaluations of its transformer, of which a verification of
    prefixes has one for every drafted step. `distance_sum` is over judged tokens.
    """

    verdicts: Verdicts = field(default_factory=Verdicts)
    rounds: dict[int, Verdicts] = field(default_factory=dict)
    target_rounds: int = 0
    target_calls: int = 0
    draft_calls: int = 0
    prefilled: int = 0
    distance_sum: float = 0.0
    per_image: list[Verdicts] = field(default_factory=list)

    def count_target(self, evaluations: int = 1) -> None:
        """Count a step of the target or a verification, with its evaluations of the transformer."""
        self.target_rounds += 1
        self.target_calls += evaluations

    def record(self, known: int, verdicts: Verdicts) -> None:
        """Count a verification round that began with `known` tokens."""
        self.verdicts.add(verdicts)
        self.rounds.setdefault(known, Verdicts()).add(verdicts)

    def add(self, other: Statistics) -> None:
        """Add the counts of another batch."""
        for known, verdicts in other.rounds.items():
            self.record(known, verdicts)
        self.target_rounds += other.target_rounds
        self.target_calls += other.target_calls
        self.draft_calls += other.draft_calls
        self.prefilled += other.prefilled
        self.distance_sum += other.distance_sum
        self.per_image += other.per_image

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted tokens per judged token, 0 to 1; None if the method judges none."""
        return self.verdicts.acceptance_rate

    @property
    def mean_distance(self) -> float | None:
        """Mean Euclidean distance between draft tokens and the target's aligned samples."""
        judged = self.verdicts.proposed - self.verdicts.discarded
        return self.distance_sum / judged if judged else None


@dataclass
class Tally:
    """Counts of some images: `seconds` of computation, without opening sessions or writing."""

    images: int = 0
    seconds: float = 0.0
    statistics: Statistics = field(default_factory=Statistics)
    calls: dict[str, CallStats] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Add the counts of other images."""
        self.images += other.images
        self.seconds += other.seconds
        self.statistics.add(other.statistics)
        for name, stats in other.calls.items():
            own = self.calls.setdefault(name, CallStats())
            own.calls += stats.calls
            own.seconds += stats.seconds


# Tallies as JSON and back.
TALLY: TypeAdapter[Tally] = TypeAdapter(Tally)
MOST_IMAGES = 1 << 40  # of a tally that was read; beyond is no count


def read_tally(content: object) -> Tally | None:
    """A tally from what was read as JSON; None if it is none, or has counts that cannot be."""
    try:
        tally = TALLY.validate_json(json.dumps(content), strict=True)
    except (ValueError, RecursionError):
        return None
    possible = 0 <= tally.images < MOST_IMAGES and 0 <= tally.seconds < math.inf
    return tally if possible and tally.statistics.verdicts.adds_up else None
