"""How far the head of a model speculates in a run, and how many tokens it samples together."""

from __future__ import annotations

from cspd.runtime.config import HeadChoice, RunConfig
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.decode.plan import MaskPlan
from cspd.runtime.heads.speculation import SpeculationOptions

DEFAULT_WINDOW = 8


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
