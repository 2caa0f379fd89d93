"""Plain stepping or speculation, and how far: one choice per model and run, from measured costs.

Made before the run and recorded, so that the same command makes the same images again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cspd.engines.manifest import Role
from cspd.runtime.config import HeadChoice, RunConfig
from cspd.runtime.costs.predict import MARGIN, Forecast
from cspd.runtime.decode.options import CspdOptions
from cspd.runtime.decode.plan import MaskPlan


@dataclass(frozen=True)
class Explained:
    """A choice, why it was made, and the milliseconds per image batch that it promises."""

    choice: HeadChoice
    reason: str
    expected: float


def tokens_together(role: Role, config: RunConfig, num_tokens: int) -> list[int]:
    """How many tokens each head call of a run samples, where that is known beforehand.

    For the target of `cspd`: about what a window of drafts holds, in every verification.
    """
    plan = MaskPlan(num_tokens, config.num_iter)
    if role == "target" and config.method == "cspd":
        windows = CspdOptions.of(config).windows(plan)
        widths = windows.widths if windows.in_steps else [min(config.gamma, num_tokens)]
        return [config.batch_size * width for width in widths]
    return [config.batch_size * int(width) for width in np.diff((0, *plan.boundaries))]


def choose(
    role: Role,
    forecast: Forecast,
    tokens: Iterable[int],
    *,
    fixed: bool,
    max_rows: int,
    window: int | None,
) -> Explained:
    """The window, and up to how many tokens, that make the calls of `tokens` cheapest together.

    `fixed`: every round evaluates all rows of its window, as reproducible runs do. `window` is the
    user's own, if any. Speculation has to promise clearly less than plain stepping.
    """
    counts = sorted(tokens)
    sizes = sorted(set(counts))
    plain = {n: forecast.plain(n) for n in sizes}
    spent = sum(plain[n] for n in counts)
    best, least = HeadChoice(role=role, window=1, up_to=0), spent
    windows = (window,) if window else forecast.windows(fixed=fixed)
    for candidate in (w for w in windows if w > 1):
        cost = {
            n: forecast.speculative(n, candidate, fixed=fixed)
            for n in sizes
            if n * candidate <= max_rows
        }
        up_to = 0
        for n in sizes:
            if n not in cost or cost[n] >= MARGIN * plain[n]:
                break
            up_to = n
        total = sum(cost[n] if n <= up_to else plain[n] for n in counts)
        if up_to and total < least:
            best, least = HeadChoice(role=role, window=candidate, up_to=up_to), total
    return Explained(best, _reason(best, sizes, spent, least), least)


def expected_ms(
    forecast: Forecast, choice: HeadChoice, tokens: Iterable[int], *, fixed: bool
) -> float:
    """Milliseconds per image batch that `choice` promises for calls of `tokens`."""

    def cost(count: int) -> float:
        if count <= choice.up_to:
            return forecast.speculative(count, choice.window, fixed=fixed)
        return forecast.plain(count)

    return sum(calls * cost(count) for count, calls in Counter(tokens).items())


def choose_table(ways: Mapping[bool, Explained]) -> Explained:
    """The cheapest of `ways`: with a table of modulations (True) and, if possible, without."""
    table = min(ways, key=lambda way: ways[way].expected)
    best = ways[table]
    if len(ways) == 1:
        return best
    words = "looked up in a table" if table else "computed again in every call"
    spent = f"{ways[True].expected:.0f} ms with a table, {ways[False].expected:.0f} ms without"
    choice = best.choice.model_copy(update={"table": table})
    return Explained(choice, f"{best.reason}; modulations {words}: {spent}", best.expected)


def _reason(choice: HeadChoice, sizes: list[int], plain: float, spent: float) -> str:
    span = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    if choice.up_to == 0:
        return (
            f"plain stepping: for {span} tokens together no window promises less than "
            f"{MARGIN:.0%} of its {plain:.0f} ms per image batch"
        )
    rest = "" if choice.up_to >= sizes[-1] else ", plain stepping for more"
    return (
        f"speculation with {choice.window} rows a token for up to {choice.up_to} tokens "
        f"together{rest}: {spent:.0f} ms per image batch expected, plain stepping {plain:.0f} ms"
    )
