"""Which head samples the tokens of a model in a run: as asked for, or by measured costs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

from cspd.engines.manifest import Role
from cspd.runtime.adaptive import AdaptiveHead, Speculative
from cspd.runtime.chain_numbers import ChainNumbers
from cspd.runtime.choose import Explained, choose, choose_table, expected_ms, tokens_together
from cspd.runtime.config import HeadChoice, RunConfig
from cspd.runtime.heads import DEFAULT_WINDOW, MixedHead, most_tokens, speculation
from cspd.runtime.lossless import SpeculativeHead
from cspd.runtime.member import Head
from cspd.runtime.open_heads import OpenHeads
from cspd.runtime.relax import Relaxation, SameNoiseRound
from cspd.runtime.tuning import HeadCosts, Working, saved, tuned
from cspd.runtime.window import WindowChooser


@dataclass
class RunHeads:
    """Heads of the models for the settings of a run, made of `heads`.

    What was learnt about windows is kept from one run to the next with the same settings.
    """

    heads: OpenHeads
    working: Working = nullcontext
    learnt: dict[tuple[Role, RunConfig], tuple[HeadChoice, WindowChooser]] = field(
        default_factory=dict
    )

    def head(self, role: Role, config: RunConfig) -> Head:
        """How `role` samples tokens from their conditions."""
        mode, choice, widest = config.head_mode, config.choice(role), self._widest(role, config)
        if mode == "auto" and choice is None and not config.reproducible:
            return self._adaptive(role, config, widest)
        if choice is None:
            choice = self._by_costs(role, config) if mode == "auto" else self._asked(role, config)
        if mode == "plain" or choice.up_to == 0:
            return self._plain(role, config, choice)
        choice = choice.model_copy(update={"up_to": min(choice.up_to, widest)})
        speculative = self._speculative(role, config, choice)
        if choice.up_to == widest:
            return speculative
        return MixedHead(self._plain(role, config, choice), speculative, choice.up_to)

    def resolve(
        self, config: RunConfig, roles: list[Role]
    ) -> tuple[RunConfig, dict[Role, Explained]]:
        """`config` with the choices that costs made for `roles` written down, and their reasons.

        "auto" measures costs that nobody measured before; a run with it that need not be
        reproducible is left to choose as it goes. Where heads step or speculate as asked for, only
        the table of modulations is chosen, by the costs that `cspd-run tune` left, if any.
        """
        if config.heads or (config.head_mode == "auto" and not config.reproducible):
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

        def best(chooser: WindowChooser) -> Explained:
            fixed, window = config.reproducible, config.window
            return choose(role, chooser, tokens, fixed=fixed, max_rows=limit, window=window)

        return choose_table({table: best(chooser) for table, chooser in costs.choosers().items()})

    def _table(self, role: Role, config: RunConfig, costs: HeadCosts) -> Explained:
        """What was asked for, with a table of modulations or without."""
        choice, tokens = self._asked(role, config), self._tokens(role, config)
        way = f"speculation with {choice.window} rows a token" if choice.up_to else "plain stepping"

        def spent(chooser: WindowChooser) -> Explained:
            expected = expected_ms(chooser, choice, tokens, fixed=config.reproducible)
            return Explained(choice, way, expected)

        return choose_table({table: spent(chooser) for table, chooser in costs.choosers().items()})

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

    def _adaptive(self, role: Role, config: RunConfig, widest: int) -> Head:
        """Chooses per call, and learns from call to call."""
        if (role, config) not in self.learnt:
            costs = tuned(self.heads, role, config, self.working)
            best = self._cheapest(role, config, costs).choice
            chooser = costs.choosers()[best.table]
            update = {"window": chooser.max_window, "up_to": widest}
            self.learnt[role, config] = best.model_copy(update=update), chooser
        choice, chooser = self.learnt[role, config]
        speculative = self._speculative(role, config, choice)
        return AdaptiveHead(self._plain(role, config, choice), speculative, chooser)

    def _plain(self, role: Role, config: RunConfig, choice: HeadChoice) -> Head:
        return self.heads.plain(role, _memory(config, choice))

    def _speculative(self, role: Role, config: RunConfig, choice: HeadChoice) -> Speculative:
        """The head in speculative rounds, exact or relaxed."""
        relaxation = Relaxation.parse(config.relax) if config.relax else None
        if relaxation is not None and relaxation.kind == "sigma":
            denoiser = self.heads.sessions(f"{role}/denoiser")
            options = speculation(denoiser.spec.axes["rows"].max, config, choice)
            channels = self.heads.bundle.manifest.geometry.token_dim
            return SpeculativeHead(SameNoiseRound(denoiser, relaxation.amount), options, channels)
        numbers = ChainNumbers if relaxation is None else relaxation.numbers
        options = speculation(self.heads.most_rows(role), config, choice)
        return self.heads.speculative(role, options, _memory(config, choice), numbers)


def _memory(config: RunConfig, choice: HeadChoice) -> int:
    """Bytes for the head's modulations: none if they are not to be looked up."""
    return config.modulation_memory << 20 if choice.table else 0
