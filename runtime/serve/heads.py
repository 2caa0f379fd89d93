"""How often the target's head was evaluated for a batch, and how often plain stepping is."""

from __future__ import annotations

from dataclasses import dataclass, field

from cspd.engines.manifest import Role
from cspd.engines.schedule import Schedule
from cspd.runtime.config import RunConfig
from cspd.runtime.heads.base import Head, HeadSample, Rows
from cspd.runtime.heads.speculation import SpeculativeSample
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.pipeline import Pipeline


@dataclass
class HeadCalls:
    """Evaluations of the head that wait for one another: `made`, and by stepping `plain`."""

    made: int = 0
    plain: int = 0

    def clear(self) -> None:
        """Begin again."""
        self.made = self.plain = 0

    def as_dict(self) -> dict[str, int]:
        """The counts as the API names them."""
        return {"head_calls": self.made, "plain_head_calls": self.plain}


@dataclass(frozen=True)
class CountingHead:
    """`head`, counted in `calls`."""

    head: Head
    calls: HeadCalls

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row."""
        sampled = self.head(rows, schedule, noise, purpose)
        if isinstance(sampled, SpeculativeSample):
            self.calls.made += sampled.stats.rounds
        else:
            self.calls.made += schedule.num_steps
        self.calls.plain += schedule.num_steps
        return sampled


@dataclass
class CountingPipeline(Pipeline):
    """A pipeline that counts in `head_calls` how often the target's head is evaluated."""

    head_calls: HeadCalls = field(default_factory=HeadCalls)

    def head(self, role: Role, config: RunConfig) -> Head:
        """How `role` samples tokens from their conditions."""
        head = super().head(role, config)
        return CountingHead(head, self.head_calls) if role == "target" else head
