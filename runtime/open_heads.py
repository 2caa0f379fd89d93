"""The heads of a bundle's models on one backend: which graphs, and which way through them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from cspd.engines.backends import ENGINES
from cspd.engines.bundle import Bundle
from cspd.engines.cuda_graph import Graphs, GraphStats
from cspd.engines.errors import CspdError
from cspd.engines.session import TimedSession
from cspd.engines.words import setting
from cspd.runtime.adaptive import Speculative
from cspd.runtime.captured import CapturedSteps, bucket, captured_steps
from cspd.runtime.chain_numbers import ChainNumbers, MakeNumbers
from cspd.runtime.hoisted import Room, SpeculativeWithinMemory, WithinMemory
from cspd.runtime.lossless import SpeculativeHead
from cspd.runtime.lossless_loop import SpeculativeLoopHead
from cspd.runtime.member import DEFAULT_MEMORY, Head, LoopHead, StepHead, step_limit
from cspd.runtime.sessions import Sessions
from cspd.runtime.speculation import SpeculationOptions


@dataclass
class OpenHeads:
    """Heads of the models whose graphs `sessions` opens.

    Captured loops are kept: by role, and hoisted ones by the role and "hoisted". `graphs` records
    them, CUDA graphs unless given; what none holds is noted in `sessions`.
    """

    sessions: Sessions
    graphs: Graphs | None = None
    loops: dict[str, CapturedSteps | None] = field(default_factory=dict)

    @property
    def bundle(self) -> Bundle:
        """The bundle whose heads these are."""
        return self.sessions.bundle

    @property
    def captures(self) -> dict[str, GraphStats]:
        """How the captured loops ran, by their names; empty without engines."""
        return {name: steps.loop.stats for name, steps in self.loops.items() if steps}

    def most_rows(self, role: str) -> int:
        """Rows that fit into one call of speculation."""
        return self.bundle.graph(f"{role}/speculative_round").spec.axes["rows"].max

    def has_tables(self, role: str) -> bool:
        """Whether the heads of `role` can look modulations up, and can do without."""
        return (
            self.sessions.backend in ENGINES
            and f"{role}/head_modulation" in self.bundle.manifest.graphs()
        )

    def plain(self, role: str, memory: int = DEFAULT_MEMORY) -> Head:
        """Every denoising step a call, or the whole loop one; `memory` bytes ahead of the steps."""
        if self._loops_inside(f"{role}/denoiser_loop"):
            return LoopHead(self.sessions(f"{role}/denoiser_loop"), memory)
        whole = self._step_head(role, f"{role}/denoiser", None)
        modulate = self._modulate(role, memory)
        if modulate is None:
            return whole
        hoisted = self._step_head(f"{role} hoisted", f"{role}/denoiser_hoisted", modulate)
        padded = partial(bucket, limit=step_limit(hoisted.session))
        return WithinMemory(hoisted, whole, Room(modulate, memory, padded))

    def speculative(
        self, role: str, options: SpeculationOptions, memory: int = DEFAULT_MEMORY,
        numbers: MakeNumbers = ChainNumbers,
    ) -> Speculative:  # fmt: skip
        """The head in rounds, exact with exact `numbers`: all in one call where the backend loops.

        `memory` as for `plain`.
        """
        most = self.bundle.graph(f"{role}/speculative_round").spec.axes["window"].max
        if options.window > most:
            raise CspdError(
                f"{setting('window')} is {options.window}, the bundle was built for 1..{most}"
            )
        if self._loops_inside(f"{role}/speculative_loop"):
            loop = self.sessions(f"{role}/speculative_loop")
            return SpeculativeLoopHead(loop, options, memory=memory, numbers=numbers)
        channels = self.bundle.manifest.geometry.token_dim
        rounds = self.sessions(f"{role}/speculative_round")
        whole = SpeculativeHead(rounds, options, channels, numbers)
        modulate = self._modulate(role, memory)
        if modulate is None:
            return whole
        rounds = self.sessions(f"{role}/speculative_round_hoisted")
        hoisted = SpeculativeHead(rounds, options, channels, numbers, modulate)
        return SpeculativeWithinMemory(hoisted, whole, Room(modulate, memory, options.call_tokens))

    def _step_head(self, name: str, label: str, modulate: TimedSession | None) -> StepHead:
        """Steps of graph `label`, as a captured loop `name` if it is an engine's."""
        role, first = label.partition("/")[0], None
        if f"{role}/denoiser_first" in self.bundle.manifest.graphs():
            first = self.sessions(f"{role}/denoiser_first")
        session = self.sessions(label)
        if name not in self.loops:
            self.loops[name] = captured_steps(
                session, first, modulate, on_fallback=self.sessions.notes.append, graphs=self.graphs
            )
        return StepHead(session, first, self.loops[name], modulate)

    def _modulate(self, role: str, memory: int) -> TimedSession | None:
        """What fills a table of modulations; None if there is none, or no `memory` for it."""
        possible = memory > 0 and self.has_tables(role)
        return self.sessions(f"{role}/head_modulation") if possible else None

    def _loops_inside(self, label: str) -> bool:
        """Whether the bundle has the loop `label`, and the backend runs such graphs."""
        return label in self.bundle.manifest.graphs() and self.sessions.backend not in ENGINES
