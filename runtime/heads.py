"""How a model's head samples: plainly, in speculative rounds, or by the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from cspd.engines.schedule import Schedule
from cspd.runtime.config import HeadChoice, RunConfig
from cspd.runtime.cspd import CspdOptions
from cspd.runtime.member import Head, HeadSample, Rows
from cspd.runtime.noise import Noise, Purpose
from cspd.runtime.plan import MaskPlan
from cspd.runtime.speculation import SpeculationOptions

DEFAULT_WINDOW = 8


@dataclass(frozen=True)
class MixedHead:
    """`speculative` for up to `up_to` tokens together, `plain` for more; one distribution."""

    plain: Head
    speculative: Head
    up_to: int

    def __call__(
        self, rows: Rows, schedule: Schedule, noise: Noise, purpose: Purpose
    ) -> HeadSample:
        """Sample every row."""
        head = self.speculative if len(rows.images) <= self.up_to else self.plain
        return head(rows, schedule, noise, purpose)


def most_tokens(role: str, config: RunConfig, num_tokens: int) -> int:
    """Most tokens that a head samples together in a run of `config`."""
    plan = MaskPlan(num_tokens, config.num_iter)
    widest = plan.widest
    if role == "target" and config.method == "cspd":
        widest = CspdOptions.of(config).windows(plan).widest
    return config.batch_size * widest


def speculation(limit: int, config: RunConfig, choice: HeadChoice) -> SpeculationOptions:
    """Rounds of `choice.window` rows for `choice.up_to` tokens; `limit` rows fit into a call.

    They have one shape if images must not depend on their batch.
    """
    window = choice.window
    fixed = max(window, min(limit, choice.up_to * window))
    buckets = (fixed,) if config.reproducible else ()
    return SpeculationOptions(window, row_buckets=buckets, max_rows=limit)
