"""The heads of a bundle's models on one backend: which graphs, and which way through them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from cspd.engines.backends import BACKENDS
from cspd.engines.bundle import Bundle
from cspd.engines.errors import CspdError
from cspd.engines.sessions.cuda_graph import Graphs, GraphStats, TorchGraphs
from cspd.engines.sessions.session import ForkableSession, Session, TimedSession
from cspd.engines.words import setting
from cspd.runtime.heads.base import Head
from cspd.runtime.heads.captured import (
    CapturedBackbone,
    CapturedCall,
    CapturedSteps,
    bucket,
    captured_call,
    captured_steps,
)
from cspd.runtime.heads.captured_rounds import CapturedRounds
from cspd.runtime.heads.numbers import ChainNumbers, MakeNumbers
from cspd.runtime.heads.plain import DEFAULT_MEMORY, LoopHead, StepHead, step_limit
from cspd.runtime.heads.speculation import SpeculationOptions
from cspd.runtime.heads.speculative import SpeculativeHead
from cspd.runtime.heads.speculative_loop import SpeculativeLoopHead
from cspd.runtime.heads.switch import Room, Switch
from cspd.runtime.sessions import Sessions


@dataclass
class OpenHeads:
    """Transformers and heads of the models whose graphs `sessions` opens.

    What is captured is kept: loops by role, and hoisted ones by the role and "hoisted". `graphs`
    records them, CUDA graphs unless given; what none holds is noted in `sessions`. `record` says
    whether anything is, in place of graphs with loops; by default as the backend is faster.
    """

    sessions: Sessions
    graphs: Graphs | None = None
    record: bool | None = None
    loops: dict[str, CapturedSteps | None] = field(default_factory=dict)
    rounds: dict[str, CapturedRounds] = field(default_factory=dict)
    calls: dict[str, Session] = field(default_factory=dict)

    @property
    def bundle(self) -> Bundle:
        """The bundle whose heads these are."""
        return self.sessions.bundle

    @property
    def captures(self) -> dict[str, GraphStats]:
        """How what is captured ran, by name; empty where nothing can be."""
        loops = {name: steps.loop.stats for name, steps in self.loops.items() if steps}
        rounds = {f"{name} rounds": rounds.stats for name, rounds in self.rounds.items()}
        calls = {
            name: call.loop.stats
            for name, call in self.calls.items()
            if isinstance(call, CapturedCall)
        }
        return loops | rounds | calls

    @cached_property
    def _recorder(self) -> Graphs:
        """What records: one for all, so that they share their memory."""
        return self.graphs or TorchGraphs()

    @property
    def _records(self) -> bool:
        """Whether calls are recorded, in place of graphs with loops."""
        if self.record is not None:
            return self.record
        kind = torch.device(self.sessions.device).type
        return kind not in BACKENDS[self.sessions.backend].loops_on

    def backbone(self, role: str) -> Session:
        """The transformer of `role`."""
        return self._call(f"{role}/backbone", CapturedBackbone)

    def _call(self, label: str, make: type[CapturedCall] = CapturedCall) -> Session:
        """The session of `label`, recorded if anything is."""
        if label not in self.calls:
            session = self.sessions(label)
            self.calls[label] = (
                session
                if not self._records
                else captured_call(
                    session, make, on_fallback=self.sessions.notes.append, graphs=self._recorder
                )
            )
        return self.calls[label]

    def most_rows(self, role: str) -> int:
        """Rows that fit into one call of speculation."""
        return self.bundle.graph(f"{role}/speculative_round").spec.axes["rows"].max

    def has_tables(self, role: str) -> bool:
        """Whether the heads of `role` can look modulations up, and can do without."""
        return self._records and self._has(f"{role}/head_modulation")

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
        return Switch(Room(modulate, memory, padded).holds, hoisted, whole)

    def speculative(
        self, role: str, options: SpeculationOptions, memory: int = DEFAULT_MEMORY,
        numbers: MakeNumbers = ChainNumbers,
    ) -> Head:  # fmt: skip
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
        whole = self._round_head(role, options, numbers, None)
        modulate = self._modulate(role, memory)
        if modulate is None:
            return whole
        hoisted = self._round_head(role, options, numbers, modulate)
        room = Room(modulate, memory, options.call_tokens)
        return Switch(room.holds, hoisted, whole)

    def _round_head(
        self, role: str, options: SpeculationOptions, numbers: MakeNumbers,
        modulate: TimedSession | None,
    ) -> Head:  # fmt: skip
        """The head in rounds of one graph each: captured ones, if they can be."""
        hoisted = "_hoisted" if modulate else ""
        session = self.sessions(f"{role}/speculative_round{hoisted}")
        if not (self._records and isinstance(session.session, ForkableSession)):
            channels = self.bundle.manifest.geometry.token_dim
            return SpeculativeHead(session, options, channels, numbers, modulate)
        name = f"{role}{hoisted.replace('_', ' ')}"
        if name not in self.rounds:
            self.rounds[name] = CapturedRounds(
                session, modulate, on_fallback=self.sessions.notes.append, graphs=self._recorder
            )
        first = None
        if self._first(role) and BACKENDS[self.sessions.backend].makes_graphs:
            first = self._call(f"{role}/denoiser_first")
        return SpeculativeLoopHead(self.rounds[name], options, numbers=numbers, first=first)

    def _step_head(self, name: str, label: str, modulate: TimedSession | None) -> StepHead:
        """Steps of graph `label`, as a captured loop `name` if it is an engine's."""
        session, first = self.sessions(label), self._first(label.partition("/")[0])
        if name not in self.loops and self._records:
            self.loops[name] = captured_steps(
                session, first, modulate, on_fallback=self.sessions.notes.append,
                graphs=self._recorder,
            )  # fmt: skip
        return StepHead(session, first, self.loops.get(name), modulate)

    def _first(self, role: str) -> TimedSession | None:
        """The head in float32 for the first step; None if all of the head is."""
        label = f"{role}/denoiser_first"
        return self.sessions(label) if label in self.bundle.manifest.graphs() else None

    def _modulate(self, role: str, memory: int) -> TimedSession | None:
        """What fills a table of modulations; None if there is none, or no `memory` for it."""
        possible = memory > 0 and self.has_tables(role)
        return self.sessions(f"{role}/head_modulation") if possible else None

    def _loops_inside(self, label: str) -> bool:
        """Whether the bundle has the loop `label`, and the backend is fastest with it."""
        return label in self.bundle.manifest.graphs() and not self._records

    def _has(self, label: str) -> bool:
        """Whether there is a graph `label`."""
        made = BACKENDS[self.sessions.backend].makes_graphs
        return made or label in self.bundle.manifest.graphs()
