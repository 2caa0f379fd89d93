"""Which head samples the tokens of a model in a run: as asked for, or by measured costs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cspd.engines.manifest import Role
from cspd.runtime.config import HeadChoice, RunConfig
from cspd.runtime.costs.choose import Explained, choose, choose_table, expected_ms, tokens_together
from cspd.runtime.costs.measure import HeadCosts, Working, saved, tuned
from cspd.runtime.costs.predict import Forecast
from cspd.runtime.costs.sizes import DEFAULT_WINDOW, most_tokens, speculation
from cspd.runtime.heads.base import Head
from cspd.runtime.heads.numbers import ChainNumbers, MakeNumbers
from cspd.runtime.heads.open_heads import OpenHeads
from cspd.runtime.heads.relax import LenientNumbers, total_variation
from cspd.runtime.heads.switch import Switch, few

# What differs from run to run and makes no difference to heads.
OF_IMAGES: dict[str, Any] = {"labels": (0,), "seed": 0, "num_images": 1, "class_balanced": False}
MOST_KEPT = 16  # heads, for servers that see many settings


@dataclass
class RunHeads:
    """Heads of the models for the settings of a run, made of `heads`, once for equal settings."""

    heads: OpenHeads
    working: Working = nullcontext
    made: dict[tuple[Role, RunConfig], Head] = field(default_factory=dict)

    def head(self, role: Role, config: RunConfig) -> Head:
        """How `role` samples tokens from their conditions, by the choices in `config` if any."""
        key = role, config.model_copy(update=OF_IMAGES)
        if key not in self.made:
            if len(self.made) >= MOST_KEPT:
                self.made.pop(next(iter(self.made)))
            self.made[key] = self._make(role, config)
        return self.made[key]

    def _make(self, role: Role, config: RunConfig) -> Head:
        mode, choice, widest = config.head_mode, config.choice(role), self._widest(role, config)
        if choice is None:
            choice = self._by_costs(role, config) if mode == "auto" else self._asked(role, config)
        if mode == "plain" or choice.up_to == 0:
            return self._plain(role, config, choice)
        choice = choice.model_copy(update={"up_to": min(choice.up_to, widest)})
        speculative = self._speculative(role, config, choice)
        if choice.up_to == widest:
            return speculative
        return Switch(few(choice.up_to), speculative, self._plain(role, config, choice))

    def resolve(
        self, config: RunConfig, roles: list[Role]
    ) -> tuple[RunConfig, dict[Role, Explained]]:
        """`config` with the choices that costs made for `roles` written down, and their reasons.

        "auto" measures costs that nobody measured before. Where heads step or speculate as asked
        for, only the table of modulations is chosen, by the costs that `cspd-run tune` left.
        """
        if config.heads:
            return config, {}
        found = {}
        for role in roles:
            explained = self._explain(role, config)
            if explained is not None:
                found[role] = explained
        heads = tuple(explained.choice for explained in found.values())
        return config.model_copy(update={"heads": heads}), found

    def _explain(self, role: Role, config: RunConfig) -> Explained | None:
        """The best way to sample with the head of `role`; None if there is nothing to choose."""
        if config.head_mode == "auto":
            return self._cheapest(role, config, tuned(self.heads, role, config, self.working))
        if not self.heads.has_tables(role):
            return None
        costs = saved(self.heads, role, config)
        return None if costs is None else self._table(role, config, costs)

    def _by_costs(self, role: Role, config: RunConfig) -> HeadChoice:
        return self._cheapest(role, config, tuned(self.heads, role, config, self.working)).choice

    def _cheapest(self, role: Role, config: RunConfig, costs: HeadCosts) -> Explained:
        """The cheapest way for the calls of a run, with a table of modulations or without."""
        tokens, limit = self._tokens(role, config), self.heads.most_rows(role)

        def best(forecast: Forecast) -> Explained:
            fixed, window = config.reproducible, config.window
            return choose(role, forecast, tokens, fixed=fixed, max_rows=limit, window=window)

        return choose_table({table: best(known) for table, known in costs.forecasts.items()})

    def _table(self, role: Role, config: RunConfig, costs: HeadCosts) -> Explained:
        """What was asked for, with a table of modulations or without."""
        choice, tokens = self._asked(role, config), self._tokens(role, config)
        way = f"speculation with {choice.window} rows a token" if choice.up_to else "plain stepping"

        def spent(forecast: Forecast) -> Explained:
            expected = expected_ms(forecast, choice, tokens, fixed=config.reproducible)
            return Explained(choice, way, expected)

        return choose_table({table: spent(known) for table, known in costs.forecasts.items()})

    def _asked(self, role: Role, config: RunConfig) -> HeadChoice:
        """The head that the options ask for."""
        if config.head_mode == "plain":
            return HeadChoice(role=role, window=1, up_to=0)
        window, widest = config.window or DEFAULT_WINDOW, self._widest(role, config)
        return HeadChoice(role=role, window=window, up_to=widest)

    def _tokens(self, role: Role, config: RunConfig) -> list[int]:
        return tokens_together(role, config, self.heads.bundle.manifest.geometry.num_tokens)

    def _widest(self, role: Role, config: RunConfig) -> int:
        return most_tokens(role, config, self.heads.bundle.manifest.geometry.num_tokens)

    def _plain(self, role: Role, config: RunConfig, choice: HeadChoice) -> Head:
        return self.heads.plain(role, _memory(config, choice))

    def _speculative(self, role: Role, config: RunConfig, choice: HeadChoice) -> Head:
        """The head in speculative rounds, exact or relaxed."""
        numbers: MakeNumbers = ChainNumbers
        if config.relax:
            numbers = partial(LenientNumbers, budget=total_variation(config.relax))
        options = speculation(self.heads.most_rows(role), config, choice)
        return self.heads.speculative(role, options, _memory(config, choice), numbers)


def _memory(config: RunConfig, choice: HeadChoice) -> int:
    """Bytes for the head's modulations: none if they are not to be looked up."""
    return config.modulation_memory << 20 if choice.table else 0
